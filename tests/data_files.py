"""Small files in the forms that people have, for the tests of data."""
import io, os, tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcl_repro.core.errors import DataError

REAL = os.environ.get("MCL_REPRO_REAL_DATA")     # the folder with the real data packs
real = pytest.mark.skipif(not (REAL and Path(REAL).is_dir()),
                          reason="set MCL_REPRO_REAL_DATA to the folder with the real data packs")
REAL = Path(REAL or "real data packs that are not here")


def encoded(seed=0, size=(20, 14), format="PNG", **options):
    "A small noisy picture as a file holds it."
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()

def refused(contains, f, *args, kind=DataError, **options):
    "f raises an error of that kind in one line that says `contains`."
    with pytest.raises(kind) as e:
        f(*args, **options)
    assert contains in str(e.value), str(e.value)
    assert "\n" not in str(e.value), str(e.value)

def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

def sample(key, seed, caption):
    return {
        f"{key}.jpg": encoded(seed, format="JPEG"), f"{key}.txt": caption.encode(),
        f"{key}.json": b'{"caption": "from json", "url": "u"}',
    }

def flickr_files(folder):
    (folder / "Flickr8k.token.txt").write_text(
        "".join(f"{i}.jpg#{k}\tcaption {k} of {i} .\n" for i in range(5) for k in range(5))
        + "ghost.jpg.1#0\tno picture\n"
    )
    for part, names in dict(train="3 1", dev="0", test="4").items():
        (folder/f"Flickr_8k.{part}Images.txt").write_text("".join(f"{n}.jpg\n" for n in names.split()))
    return folder/"Flickr8k.token.txt"
