"""PyTorch's results for the cases, kept in stored/ so that `make test` needs no PyTorch.

`make parity` makes the files that are absent, and all of them anew with

    make parity RENEW_PARITY=1

which is due when a case changes. A file holds no weights and no inputs: they follow from the case,
whose digest stands in the file.
"""

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.parity import cases
from tests.parity.cases import Case, Inputs, Results

FOLDER = Path(__file__).parent / "stored"
RENEW = "make it with: make parity RENEW_PARITY=1"
PROJECTIONS = 4


class Reference(NamedTuple):
    digest: str  # of the case that the results are of
    logits_XV: np.ndarray  # at the target's tokens, padding left out
    loss: float
    gradients: dict[str, np.ndarray]  # a sketch of each
    greedy_BT: np.ndarray


def path(case: Case) -> Path:
    return FOLDER / f"{case.name}.npz"


def sketch(name: str, gradient: np.ndarray) -> np.ndarray:
    """The norm, and the sums of all entries under a few fixed random signs.

    An error anywhere in the gradient moves each of the sums by about the error's norm.
    """
    wide = gradient.astype(np.float64).ravel()
    signs = np.random.RandomState(zlib.crc32(name.encode())).randint(0, 2, (PROJECTIONS, wide.size)) * 2 - 1
    return np.array([np.linalg.norm(wide), *(signs @ wide)])


def at_targets(given: Inputs, logits_BTV: np.ndarray) -> np.ndarray:
    return logits_BTV[given.target_mask_BT > 0]


def make(case: Case, found: Results, greedy_BT: np.ndarray) -> Reference:
    gradients = {name: sketch(name, gradient) for name, gradient in found.gradients.items()}
    logits_XV = at_targets(cases.inputs(case), found.logits_BTV)
    return Reference(cases.digest(case), logits_XV, found.loss, gradients, greedy_BT)


def write(case: Case, reference: Reference) -> None:
    names = sorted(reference.gradients)
    np.savez_compressed(
        path(case),
        digest=np.array(reference.digest),
        logits=reference.logits_XV,
        loss=np.float32(reference.loss),
        gradient_names=np.array(names),
        gradients=np.stack([reference.gradients[name] for name in names]).astype(np.float32),
        greedy=reference.greedy_BT.astype(np.int16),
    )


def read(case: Case) -> Reference:
    assert path(case).is_file(), f"{path(case)} is missing; {RENEW}"
    with np.load(path(case)) as file:
        return Reference(
            str(file["digest"]),
            file["logits"],
            float(file["loss"]),
            dict(zip(file["gradient_names"].tolist(), file["gradients"], strict=True)),
            file["greedy"].astype(np.int32),
        )
