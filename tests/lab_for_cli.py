"A stage for test_cli: stages must stand in a module."
from mcl_repro.lab.nodes import stage


@stage
def count(work, *, n):
    return {"n": n}
