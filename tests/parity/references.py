"""PyTorch's results for the cases, kept in stored/ so that `make test` needs no PyTorch.

`make parity` makes the files that are absent, and all of them anew with

    make parity RENEW_PARITY=1

which is due when a case changes. A file holds no weights and no inputs: they follow from the case,
whose digest stands in the file.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.parity import cases
from tests.parity.cases import Case, Inputs, Results
from tests.parity.causal_cases import CausalInputs

FOLDER = Path(__file__).parent / "stored"
RENEW = "make it with: make parity RENEW_PARITY=1"
PROJECTIONS = 4


class Reference(NamedTuple):
    digest: str  # of the case that the results are of
    logits_XV: np.ndarray  # at some of the targets' tokens
    loss: float
    gradients: dict[str, np.ndarray]  # a sketch of each
    texts: dict[str, np.ndarray]  # tokens [B, T] that were generated, -1 after their end: "greedy", and of beams
    # Of mixtures of experts:
    balance: float | None = None  # the router's balancing loss
    balance_gradients: Mapping[str, np.ndarray] = {}  # sketches of the gradients of the loss that it is added to


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
    """The logits at tokens, padding left out."""
    return logits_BTV[given.mask_BT > 0]


def stored_part(given: Inputs, logits_BTV: np.ndarray) -> np.ndarray:
    """The logits that are stored: of a causal model those at every third token, the first and the last included."""
    logits_XV = at_targets(given, logits_BTV)
    if not isinstance(given, CausalInputs):
        return logits_XV
    return logits_XV[np.unique([*range(0, len(logits_XV), 3), len(logits_XV) - 1])]


def make(
    case: Case, found: Results, texts: Mapping[str, np.ndarray], balance: tuple[float, Results] | None = None
) -> Reference:
    logits_XV = stored_part(cases.inputs(case), found.logits_BTV)
    reference = Reference(cases.digest(case), logits_XV, found.loss, _sketches(found), dict(texts))
    if balance is None:
        return reference
    return reference._replace(balance=balance[0], balance_gradients=_sketches(balance[1]))


def _sketches(found: Results) -> dict[str, np.ndarray]:
    return {name: sketch(name, gradient) for name, gradient in found.gradients.items()}


def write(case: Case, reference: Reference) -> None:
    names = sorted(reference.gradients)
    arrays: dict[str, np.ndarray] = {
        "digest": np.array(reference.digest),
        "logits": reference.logits_XV,
        "loss": np.float32(reference.loss),
        "gradient_names": np.array(names),
        "gradients": np.stack([reference.gradients[name] for name in names]).astype(np.float32),
    }
    arrays |= {f"text_{name}": tokens.astype(np.int16) for name, tokens in reference.texts.items()}
    if reference.balance is not None:
        arrays["balance"] = np.float32(reference.balance)
        arrays["balance_gradients"] = np.stack([reference.balance_gradients[n] for n in names]).astype(np.float32)
    np.savez_compressed(path(case), **arrays)


def read(case: Case) -> Reference:
    assert path(case).is_file(), f"{path(case)} is missing; {RENEW}"
    with np.load(path(case)) as file:
        names = file["gradient_names"].tolist()
        texts = {key.removeprefix("text_"): file[key].astype(np.int32) for key in file if key.startswith("text_")}
        reference = Reference(
            str(file["digest"]),
            file["logits"],
            float(file["loss"]),
            dict(zip(names, file["gradients"], strict=True)),
            texts,
        )
        if "balance" not in file:
            return reference
        gradients = dict(zip(names, file["balance_gradients"], strict=True))
        return reference._replace(balance=float(file["balance"]), balance_gradients=gradients)
