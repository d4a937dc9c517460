"A paper's notebook as a view of the store: the cells that a headless run runs, in this process."
import json
import linecache
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot as plt

import mcl_repro

PAPERS = Path(mcl_repro.__file__).parents[1]/"nbs/papers"


def view(paper, runs, **parameters):
    "Run the cells that a headless run runs, with the lab closed to new work once the plan has run; their names."
    matplotlib.use("agg")
    space = {"display": lambda *shown: None, "__name__": "__main__"}
    for cell in json.loads((PAPERS/f"{paper}.ipynb").read_text(encoding="utf-8"))["cells"]:
        tags, source = cell["metadata"].get("tags", []), "".join(cell["source"])
        if cell["cell_type"] != "code" or "example" in tags:
            continue
        if "parameters" in tags:
            source += f"\nprofile, runs, device = 'smoke', {str(runs)!r}, 'cpu'"
            source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        name = f"<cell {cell['id']}>"
        linecache.cache[name] = len(source), None, source.splitlines(True), name     # stages are compared by their text
        exec(compile(source, name, "exec"), space)
        if "experiments.run()" in source:
            space["lab"].run = lambda *nodes: pytest.fail(f"a cell computes {nodes}")
    plt.close("all")
    return space
