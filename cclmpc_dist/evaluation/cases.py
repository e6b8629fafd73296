"""Scores cases of a corpus with a predictor, shared over the ranks."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cclmpc_dist.config import Config
from cclmpc_dist.data.index import Index
from cclmpc_dist.data.loader import to_device
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.distributed import runtime
from cclmpc_dist.evaluation.evaluate import Evaluated, evaluate, gather_rows, share
from cclmpc_dist.evaluation.inference import Predict
from cclmpc_dist.evaluation.metrics import Row


def evaluate_cases(
    predict: Predict,
    index: Index,
    samples: Sequence[int] | np.ndarray,
    config: Config,
    device: torch.device,
    folder: Path | None = None,
    done: Callable[[str], None] | None = None,
) -> list[Row]:
    """Rows of all `samples` (index numbers) on every rank, each case scored by one rank. Collective.

    folder gets the predictions; done is called with the key of each case that this rank has finished.
    """
    mine = [int(samples[number]) for number in share(len(samples), runtime.rank(), runtime.world_size())]
    kind = torch.float16 if config.precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype=kind, enabled=config.precision != "fp32"):
        rows = evaluate(
            predict,
            _read(index, mine, device),
            config.data.patch,
            config.stride,
            index.classes,
            blend=config.evaluation.blend,
            batch=config.evaluation.batch,
            device=device,
            folder=folder,
            done=done,
        )
    return gather_rows(rows, device)


def _read(index: Index, samples: Sequence[int], device: torch.device) -> Iterator[Evaluated]:
    reader = Reader(index)
    for sample in samples:
        _, label = reader.volume(sample)
        spacing = tuple(float(edge) for edge in index["spacing"][sample])
        yield index.key(sample), whole(reader, sample, device), label, spacing
        reader.keep([])


def whole(reader: Reader, row: int, device: torch.device | str) -> Tensor:
    """A sample's image (C, *S) on `device`, float32 as the network sees it; it travels as it is stored."""
    stored = torch.from_numpy(np.array(reader.image(row)))
    seen = reader.index.seen(row)._asdict().items()
    numbers = {name: torch.from_numpy(values.astype(np.float32))[None] for name, values in seen}
    return to_device({"image": stored[None], **numbers}, device)["image"][0]
