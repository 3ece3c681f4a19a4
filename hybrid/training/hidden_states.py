"""A frozen language model's hidden states at the first injection point, in a folder, a file a row of data.

    key.json                    what they are of: the base, the data, the layer; and how many rows there are
    row-000000123.safetensors   hidden_states [T, D]; its checksum, and that of the tokens it came from

The first time that a row is trained on, the layers below run for it and its file is written; from then on it
is read. Files are written to a temporary path and atomically renamed; a damaged one is recomputed.
Rows that bring their own labels have lengths T of their own: what pads them in a batch is not kept.
The recursive block, the order of the data and how it is trained make no difference to the key: other runs go
on with the same folder.
"""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import PartialState
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hybrid.data.stream import TokenStream
from hybrid.model.hybrid_model import HybridModel
from hybrid.saving import base_checksum
from hybrid.saving.files import remove_left_over, replace_file
from hybrid.saving.json_files import read_object
from hybrid.training import run_folder
from hybrid.training.batches import Batch, count, describe_items
from hybrid.training.fingerprints import first_difference
from hybrid.training.lower_layers import LowerLayers
from hybrid.training.settings import TrainSettings

_KEY = "key.json"
_WRITTEN = r"key\.json|row-\d+\.safetensors"  # the names of all that is written
_FILE_OVERHEAD = 8192  # bytes on the disk beside the tensor, at most: header, and the rest of the last block
_ANOTHER_FOLDER = "Name another folder, or delete this one."
_NOT_OF_A_BASE = ("_name_or_path", "transformers_version")  # of its config


class HiddenStates:
    """The hidden states of the rows of `data` at `model`'s first injection point, in `folder`.

    Make it before the model is split among processes, open it when the model is ready to compute.

    precision   that the model computes in, as accelerate says it
    dtype       that they are kept in; None: the one they are computed in. Training sees what is kept, in the
                first pass too

    Errors: ValueError as LowerLayers, for data without an item, and for a model that is no hybrid.
    """

    def __init__(
        self,
        folder: Path | str,
        model: Any,
        data: Dataset | TokenStream,
        precision: str = "no",
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, HybridModel):
            raise ValueError(f"HiddenStates: expected a HybridModel, got {type(model).__name__}.")
        self.folder, self._data, self._dtype = Path(folder), data, dtype
        self._layers = LowerLayers(model)
        self._key: dict[str, Any] = {
            "base": _describe_base(model) | {"mixed precision": precision},
            "data": data.describe_rows() if isinstance(data, TokenStream) else describe_items(data),
            "layer": self._layers.point,
        }

    def open(self, processes: PartialState, say: Callable[[str], None]) -> None:
        """Say what it takes of the disk, then make the folder where there is none. Every process calls it.

        Rows of a stream are counted the first time: all of it is read and tokenized once for that.

        Errors: ValueError when it does not fit, when the folder holds hidden states of something else, and as
        LowerLayers.check.
        """
        some = self._layers.check()
        self._device, self._computed = some.device, some.dtype
        some = some.to(self._dtype)
        self._key["base"]["dtype"] = str(self._computed).removeprefix("torch.")
        if some.dtype != self._computed:
            self._key["base"]["kept as"] = str(some.dtype).removeprefix("torch.")
        with processes.main_process_first():
            self._begin(some, say)

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Within the block, `batch` goes forward and backward without the layers below.

        Where hidden states are missing, they are computed and written before.

        Errors: ValueError for hidden states of other tokens, OSError when they cannot be written.
        """
        digests = [_digest_of_inputs(batch, index) for index in range(len(batch.rows))]
        found = [self._read(row, digest) for row, digest in zip(batch.rows, digests, strict=True)]
        missing = [index for index, h in enumerate(found) if h is None]
        if missing:
            inputs = {name: t[missing].to(self._device) for name, t in batch.inputs.items()}
            for index, h in zip(missing, self._layers.compute(inputs).cpu(), strict=True):
                kept = h[: batch.lengths[index]].to(self._dtype or h.dtype).clone()
                self._write(batch.rows[index], kept, digests[index])
                found[index] = kept
        padded = pad_sequence([h for h in found if h is not None], batch_first=True)
        with self._layers.left_out(padded.to(self._device, self._computed)):
            yield

    def _begin(self, some: Tensor, say: Callable[[str], None]) -> None:
        remove_left_over(self.folder, _WRITTEN)
        before = self._read_key()
        all_rows, tokens = _count_of(before) if before else self._count()
        rows = self._data.count_trained(all_rows) if isinstance(self._data, TokenStream) else all_rows
        there = sum(1 for _ in self.folder.glob("row-*.safetensors"))
        width = some.shape[-1]
        of_row = math.ceil(tokens * width * some.element_size() / max(1, all_rows))
        place = next(
            path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists()
        )
        free = shutil.disk_usage(place).free
        say(
            f"hidden states after layer {self._layers.point} in {self.folder}: {rows:,} rows x "
            f"{_mean(tokens, all_rows)} tokens x {width:,} x {some.element_size()} bytes = "
            f"{rows * of_row:,} bytes; {there:,} rows are "
            f"there, {free:,} bytes are free"
        )
        needed = max(0, rows - there) * (of_row + _FILE_OVERHEAD)
        if needed > free:
            raise ValueError(
                f"HiddenStates: expected {needed:,} free bytes on the disk of {self.folder}, got {free:,}."
            )
        run_folder.make_folder(self.folder, "HiddenStates")
        if before is None:
            content = json.dumps({**self._key, "rows": all_rows, "tokens": tokens}, indent=1).encode()
            replace_file(self.folder / _KEY, content)

    def _read_key(self) -> dict[str, Any] | None:
        """What the folder's hidden states are of, which is what is asked for; None for a new folder."""
        path = self.folder / _KEY
        if not path.exists():
            if any(self.folder.glob("row-*.safetensors")):
                raise ValueError(f"HiddenStates: expected {_KEY} in {self.folder}, got rows without it.")
            return None
        before = read_object(path, "HiddenStates")
        if not all(isinstance(before.get(name), dict) for name in ("base", "data")) or not _is_count(
            before.get("rows")
        ):
            raise ValueError(f"HiddenStates: expected in {path} what a run writes there, got something else.")
        then = {name: before.get(name, {}) for name in self._key}
        if difference := first_difference(then, self._key):
            name, was, now = difference
            kind = name.partition(".")[0]
            raise ValueError(
                f"HiddenStates: expected in {self.folder} those of this {kind}, got those of another: "
                f"{name} was {was}, is {now}. {_ANOTHER_FOLDER}"
            )
        return before

    def _count(self) -> tuple[int, int]:
        """(rows, tokens in all of them)"""
        if isinstance(self._data, TokenStream):
            return self._data.count_rows_and_tokens()
        rows = count(self._data)
        return rows, sum(len(self._data[index]["input_ids"]) for index in range(rows))

    def _path(self, row: int) -> Path:
        return self.folder / f"row-{row:09d}.safetensors"

    def _read(self, row: int, digest: str) -> Tensor | None:
        """[T, D]; None when it is not there or damaged."""
        path = self._path(row)
        try:
            with safetensors.safe_open(path, "pt") as file:
                facts, h = file.metadata() or {}, file.get_tensor("hidden_states")
        except FileNotFoundError:
            return None
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            _say_damaged(path, str(error))
            return None
        if facts.get("sha256") != _checksum(h, row, facts.get("inputs", "")):
            _say_damaged(path, "its checksum is another")
            return None
        if facts["inputs"] != digest:
            raise ValueError(
                f"HiddenStates: expected in {self.folder} those of this data, got those of another: the "
                f"tokens of row {row} differ. {_ANOTHER_FOLDER}"
            )
        return h

    def _write(self, row: int, h: Tensor, digest: str) -> None:
        facts = {"inputs": digest, "sha256": _checksum(h, row, digest)}
        # not awaited: a row that does not come onto the disk is computed again
        replace_file(self._path(row), save({"hidden_states": h}, facts), is_awaited=False)


def caches_of(
    model: Any,
    data: Dataset | TokenStream,
    keep: Dataset | TokenStream | None,
    settings: TrainSettings,
    precision: str,
) -> list[HiddenStates]:
    """Caches for the data and for what is kept; none where none is asked for.

    Errors: ValueError as HiddenStates, and for a length_curriculum beside it.
    """
    if settings.cache_hidden_states is None:
        return []
    if settings.length_curriculum is not None:
        raise ValueError(
            "train: expected cache_hidden_states or a length_curriculum, got both: the hidden states of "
            "whole rows are kept."
        )
    folder = Path(settings.cache_hidden_states)
    dtype = None if settings.cache_dtype is None else getattr(torch, settings.cache_dtype)
    caches = [HiddenStates(folder, model, data, precision, dtype)]
    if keep is not None:
        caches.append(HiddenStates(folder / "keep", model, keep, precision, dtype))
    return caches


def _describe_base(model: HybridModel) -> dict[str, str]:
    """Checksums of the language model's config, and of all of its tensors."""
    base = model.llm_model
    config = {name: value for name, value in base.config.to_dict().items() if name not in _NOT_OF_A_BASE}
    sums = base_checksum.tensor_sums(model.base_named_parameters())
    return {
        "class": type(base).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "attention": str(base.config._attn_implementation),
        "weights": hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest(),
    }


def _is_count(rows: Any) -> bool:
    return type(rows) is int and rows > 0


def _count_of(before: dict[str, Any]) -> tuple[int, int]:
    """(rows, tokens) that a key says; older ones were of rows of one length, and say that."""
    rows = before["rows"]
    return rows, before.get("tokens", rows * before["data"]["tokens"])


def _mean(tokens: int, rows: int) -> str:
    """Tokens of a row, in words where that is no whole number."""
    mean, rest = divmod(tokens, max(1, rows))
    return f"about {round(tokens / rows):,}" if rest else f"{mean:,}"


def _digest_of_inputs(batch: Batch, index: int) -> str:
    """Of all that a forward is given of one row, but its labels and what pads it: these make no difference to
    its hidden states."""
    digest, length = hashlib.sha256(), batch.lengths[index]
    for name, tensor in sorted(batch.inputs.items()):
        values = tensor[index, :length].contiguous()
        is_no_mask = name == "attention_mask" and bool((values == 1).all())
        if name != "labels" and not is_no_mask:
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _checksum(h: Tensor, row: int, digest: str) -> str:
    content = hashlib.sha256(f"{row} {digest} {h.dtype} {list(h.shape)}".encode())
    content.update(h.contiguous().view(torch.uint8).numpy().data)
    return content.hexdigest()


def _say_damaged(path: Path, why: str) -> None:
    warnings.warn(f"{path} is damaged ({why}): its hidden states are computed again.", stacklevel=3)
