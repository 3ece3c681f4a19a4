"""PuzzleModel: a TRM between embeddings and heads; its weights on disk have the names of the paper's code

    tokens, kind -> x = [prefix | cells] -> trm_kernels.TRM, y and z in and out -> y of cells -> tokens
                                                                                -> first y -> done?

Backend  `backend("auto")`: Triton kernels on CUDA, in bfloat16, and the reference on a CPU, in float32.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from puzzles.settings import Settings
from trm_kernels import TRM, Depth


class Sizes(NamedTuple):
    """What the puzzles say about the model."""

    cells: int
    vocabulary: int  # tokens, that which pads among them
    kinds: int = 1  # of puzzles: rows of the puzzle embedding


class PuzzleModel(nn.Module):
    """Embeddings, a TRM and two heads. Outside the TRM, parameters have the names of the paper's code."""

    has_sparse_gradients = True  # of the puzzle embedding: only the batch's rows, as SparseSignSGD wants them

    def __init__(self, sizes: Sizes, settings: Settings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.width, self.prefix = width, settings.prefix
        embedding = torch.randn(sizes.vocabulary, width) / math.sqrt(width)
        self.embed_tokens = nn.ParameterDict({"embedding_weight": nn.Parameter(embedding)})
        self.puzzle_emb = nn.ParameterDict({"weights": nn.Parameter(torch.zeros(sizes.kinds, width))})
        self.trm = TRM(
            width,
            settings.num_heads,
            num_recursion_steps=settings.n,
            num_cycles=settings.cycles,
            mlp_t=settings.mlp_t,
            seq_len=settings.prefix + sizes.cells if settings.mlp_t else None,
        )
        self.lm_head = nn.Linear(width, sizes.vocabulary, bias=False)
        self.q_head = nn.Linear(width, 2)  # as in the paper's code; its second output is not used
        nn.init.zeros_(self.q_head.weight)
        nn.init.constant_(self.q_head.bias, -5.0)

    def embed(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        """x [B, prefix + cells, D] of tokens [B, cells], kinds [B]: the kind's embedding, zeros, cells."""
        cells = F.embedding(tokens, self.embed_tokens["embedding_weight"])
        kind = F.embedding(kinds, self.puzzle_emb["weights"], sparse=self.has_sparse_gradients)
        prefix = F.pad(kind, (0, (self.prefix - 1) * self.width)).view(-1, self.prefix, self.width)
        x = math.sqrt(self.width) * torch.cat([prefix, cells], dim=1)
        return x.to(torch.bfloat16 if x.is_cuda else torch.float32)

    def start(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(y, z) before the first supervision step, each [B, prefix + cells, D]."""
        size = (len(tokens), self.prefix + tokens.shape[1], self.width)
        dtype = torch.bfloat16 if tokens.is_cuda else torch.float32
        y, z = (start.detach().to(dtype).expand(size) for start in (self.trm.y_init, self.trm.z_init))
        return y, z

    def forward(
        self, x: Tensor, y: Tensor, z: Tensor, depth: Depth | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, z, logits [B, cells, V], q [B]) of a supervision step; q > 0 says that all cells are right."""
        y, z = self.trm(x, y, z, **({} if depth is None else depth._asdict()))
        return y.detach(), z.detach(), *self.read(y)

    def read(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, cells, V], q [B]) of an answer."""
        return self.lm_head(y[:, self.prefix :].float()), self.q_head(y[:, 0].float())[:, 0]


# Weights on disk: safetensors, under the names of the paper's code

_THEIRS = {"trm.layers": "L_level.layers", "trm.y_init": "H_init", "trm.z_init": "L_init"}


def save(model: PuzzleModel, file: Path, step: int = 0) -> None:
    """`inner.` and L_level.layers..., H_init, L_init, embed_tokens.embedding_weight, lm_head.weight, ...

    The training step that the weights are of stands in the file's metadata.
    """
    tensors = {
        "inner." + re.sub("|".join(_THEIRS), lambda ours: _THEIRS[ours[0]], name): tensor
        for name, tensor in model.state_dict().items()
    }
    beside = file.with_name(f"{file.name}.part")  # renamed when whole: a killed run leaves the old weights
    save_file(tensors, beside, metadata={"step": str(step)})
    beside.replace(file)


def step_of(file: Path) -> int | None:
    """The step that `save` was told; None where there is no such file."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as opened:
        return int((opened.metadata() or {}).get("step", -1))


def load(model: PuzzleModel, file: Path) -> None:
    """Weights of `save`, or of the paper's code in the same sizes, whatever stands before `inner.`.

    Errors: ValueError when a tensor is missing, not known or of another shape.
    """
    tensors = load_file(file)
    left_alone = model.trm.load_reference_state_dict(tensors)
    rest = {re.sub(r"^.*\binner\.", "", name): tensors[name] for name in left_alone}
    ours = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("trm.")}
    if (got := {name: tuple(tensor.shape) for name, tensor in rest.items()}) != ours:
        raise ValueError(f"{file}: expected beside the recursion {ours}, got {got}.")
    model.load_state_dict(rest, strict=False)
