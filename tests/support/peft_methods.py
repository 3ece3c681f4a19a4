"""Every method of PEFT on a hybrid: wrap, two training steps, save, load, disable, merge.

    python -m tests.support.peft_methods        # the table in docs/peers-tests.md

A cell says "yes", "no such thing" where PEFT has none for the method, or the error in one line.
"""

import tempfile
import warnings
from collections.abc import Callable

import peft
import torch
from peft import PeftModel, get_peft_model

from tests.support.tiny import tiny_hybrid, tokens

PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
CPT = {
    "task_type": "CAUSAL_LM",
    "cpt_token_ids": [3, 4, 5, 6],
    "cpt_mask": [1, 1, 1, 1],
    "cpt_tokens_type_mask": [1, 2, 3, 4],
}
_QV = {"target_modules": ["q_proj", "v_proj"]}
# name of the config: its arguments; all else is PEFT's default. Not tried: AdaMSS, which needs scikit-learn;
# Poly, which needs task ids; X-LoRA, which needs trained adapters; BEFT, which needs biases
METHODS: dict[str, dict[str, object]] = {
    "AdaLoraConfig": {"total_step": 10},
    "AdaptionPromptConfig": {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"},
    "BOFTConfig": {},
    "C3AConfig": {"block_size": 1},
    "CPTConfig": CPT,
    "CartridgeConfig": PROMPTS,
    "DeftConfig": {},
    "DeloraConfig": {"r": 2},
    "FourierFTConfig": {"n_frequency": 10},
    "FrodConfig": {"sparse_rate": 0.01},
    "GloraConfig": {},
    "GraloraConfig": {"r": 8, "gralora_k": 2},
    "HRAConfig": {},
    "HiraConfig": {},
    "IA3Config": {},
    "LNTuningConfig": {},
    "LilyConfig": _QV | {"r": 2},
    "LoHaConfig": _QV,
    "LoKrConfig": _QV,
    "LoraConfig": {},
    "MissConfig": {"r": 2},
    "MultitaskPromptTuningConfig": PROMPTS | {"num_tasks": 2},
    "OFTConfig": {},
    "OSFConfig": {},
    "PeanutConfig": _QV,
    "PrefixTuningConfig": PROMPTS,
    "PromptEncoderConfig": PROMPTS | {"encoder_hidden_size": 16},
    "PromptTuningConfig": PROMPTS,
    "PsoftConfig": {"r": 4, "psoft_alpha": 4},
    "PveraConfig": {"r": 4},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 2},
    "ShadowConfig": {"r": 2, "shadow_num_hidden_layers": 1},
    "ShiraConfig": {"r": 1},
    "SupertuningConfig": {"sparsity": 0.9},
    "TinyLoraConfig": {},
    "TrainableTokensConfig": {"token_indices": [3, 4]},
    "UniLoraConfig": {"theta_d_length": 257},
    "VBLoRAConfig": {"vector_length": 1, "num_vectors": 2},
    "VeraConfig": {"r": 4},
    "WaveFTConfig": {"n_frequency": 8},
}
STEPS = ("wrap", "train", "save", "load", "disable", "merge")
_HAS_NO = (
    "prompt learning",
    "does not support",
    "method is not supported",
    "no attribute 'merge",
)  # in the words of PEFT


class Trial:
    """One method on one fresh hybrid; each step builds on the one before."""

    def __init__(self, name: str) -> None:
        self.config = getattr(peft, name)(**METHODS[name])
        self.multitask = name == "MultitaskPromptTuningConfig"
        self.model: PeftModel | None = None

    def run(self, ids: torch.Tensor, **more: object):
        if self.multitask:
            more["task_ids"] = torch.zeros(len(ids), dtype=torch.long)
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)

    def logits(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.run(tokens()).logits

    def wrap(self) -> None:
        self.model = get_peft_model(tiny_hybrid(), self.config)

    def train(self) -> None:
        learned = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in learned]
        optimizer = torch.optim.SGD(learned, lr=0.1)
        self.model.train()
        for _ in range(2):
            self.run(tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert any(not torch.equal(p, b) for p, b in zip(learned, before, strict=True)), "nothing was learned"

    def save(self) -> None:
        self.want = self.logits()
        self.folder = tempfile.TemporaryDirectory()
        self.model.save_pretrained(self.folder.name)

    def load(self) -> None:
        self.model = PeftModel.from_pretrained(tiny_hybrid(), self.folder.name)
        torch.testing.assert_close(self.logits(), self.want)

    def disable(self) -> None:
        with self.model.disable_adapter():
            plain = tiny_hybrid()(input_ids=tokens()).logits
            got = self.model(input_ids=tokens()).logits
            torch.testing.assert_close(got, plain)

    def merge(self) -> None:
        merged = self.model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens()).logits, self.want, rtol=1e-3, atol=1e-4)


def outcome(name: str) -> dict[str, str]:
    """step -> "yes", "no such thing", the first line of the error, or "" after one."""
    cells = dict.fromkeys(STEPS, "")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = Trial(name)
        except Exception as error:
            return cells | {"wrap": _line(error)}
        for step in STEPS:
            act: Callable[[], None] = getattr(trial, step)
            try:
                act()
                cells[step] = "yes"
            except Exception as error:
                has_none = step in ("disable", "merge") and any(part in str(error) for part in _HAS_NO)
                cells[step] = "no such thing" if has_none else _line(error)
                if step not in ("disable", "merge"):
                    break
    return cells


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def table() -> str:
    rows = [f"| PEFT {peft.__version__} | {' | '.join(STEPS)} |", f"|---|{'---|' * len(STEPS)}"]
    for name in METHODS:
        cells = outcome(name)
        rows.append(f"| `{name}` | {' | '.join(cells[step] or '-' for step in STEPS)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
