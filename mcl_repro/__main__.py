from mcl_repro.cli.main import main

if __name__ == "__main__":
    main()
