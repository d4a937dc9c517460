"Throw-away notebooks of papers."
import nbformat

STANDARD = """profile = 'mini'
device = 'auto'
jobs = 1
seeds = 1
roles = {}
overrides = {}
runs = '../runs'
"""     # the parameters that every paper has
TABLE = """
from pathlib import Path
from mcl_repro.report.tables import tidy, write_table
df = tidy('ubt.table1', [dict(attack='BadNet', defense='UBT', metric='CA', value=value, unit='%')])
write_table(df, 'ubt.table1', Path(runs)/profile, 'Made-up numbers.')
"""     # a cell that writes a table; it wants a parameter `value`


def write(folder, name, *cells, tags=("parameters",), kernel="python3", markdown=""):
    "Write a notebook whose first code cell has the tags."
    about = {"name": kernel, "display_name": kernel, "language": "python"}
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": about})
    if markdown:
        nb.cells.append(nbformat.v4.new_markdown_cell(markdown))
    nb.cells += [nbformat.v4.new_code_cell(c) for c in cells]
    nb.cells[1 if markdown else 0].metadata["tags"] = list(tags)
    folder.mkdir(exist_ok=True, parents=True)
    nbformat.write(nb, folder/name)
