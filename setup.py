"Packaging: everything is read from settings.ini, so that names, versions and requirements stand in one place."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT_FILES = ("data_manifest.yaml", "CITATION.cff")     # stand at the top of the source tree
DATA = ("yaml", "json", "csv", "txt", "j2", "css", "js", "svg", "rst")  # data files that lie beside the code


class BuildWithManifest(build_py):
    "Put the data manifest and what to cite into the installed package, too."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for name in ROOT_FILES:
            self.copy_file(name, str(Path(self.build_lib)/"mcl_repro"/name))


parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
extras = {key.removesuffix("_requirements"): value.split()
          for key, value in settings.items() if key.endswith("_requirements")}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"],
    packages=find_namespace_packages(include=["mcl_repro", "mcl_repro.*"]),
    package_data={"mcl_repro": ["py.typed", *(f"**/*.{kind}" for kind in DATA)]},
    include_package_data=False,
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    python_requires=f">={settings['min_python']}",
    entry_points={"console_scripts": settings["console_scripts"].split("\n")},
    zip_safe=False,
    cmdclass={"build_py": BuildWithManifest},
)
