"""Models and tokenizers in memory, through transformers and PEFT. Knows nothing of the files beyond their directory."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resafe.checkpoints.adapter import check_loads
from resafe.checkpoints.precision import Precision, resolve_dtype
from resafe.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from resafe.checkpoints.reader import Checkpoint

_TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and notices of transformers and PEFT inside the block, and restores them after it."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        # The GGUF reader draws its bar through tqdm itself, past the switch above: it goes to standard error.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | Precision = "float32",
    device: str | torch.device = "cpu",
    merge: bool = True,
) -> PreTrainedModel | PeftModel:
    """Loads a causal language model in evaluation mode, from local files only and without running code from them.

    A checkpoint in object storage is downloaded whole into the cache first, once.

    Args:
        checkpoint: A model, or an adapter with its base.
        dtype: Type of the weights in memory, or a precision as in `resolve_dtype`. An adapter is merged in it; one that
            is not merged stays float32, so that it can train.
        device: Where the model goes.
        merge: Fold an adapter into the weights (fastest to run); False keeps a PeftModel. Without effect on a model.

    Raises:
        InputError: An adapter without a base, or on one that PEFT cannot rewrite again as the adapter's start did, or
            files that do not make the model their configuration describes.
    """
    from transformers import AutoModelForCausalLM

    source = checkpoint if checkpoint.kind == "model" else checkpoint.base
    if source is None:
        raise InputError(
            f"{checkpoint.reference}: the adapter names no base", f"open it as BASE+{checkpoint.reference}"
        )
    if checkpoint.kind == "adapter":
        check_loads(checkpoint)
    kind = resolve_dtype(dtype, device) if isinstance(dtype, str) else dtype
    directory = source.downloaded()
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=kind, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
            model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise _unloadable(source.path, error) from error
        if missing:  # transformers would fill these with random numbers and only warn
            raise InputError(
                f"{source.path}: lacks tensors that its config.json asks for: {', '.join(missing[:10])}",
                "the checkpoint is incomplete: download it again, or give the model this one was saved from",
            )
        if checkpoint.kind == "adapter":
            model = _with_adapter(model, checkpoint, merge)
    placed: PreTrainedModel | PeftModel = model.to(device)
    return placed.eval()


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer: an adapter's own if it has one, else its base's.

    A tokenizer without a padding token gets its end-of-sequence token for it, so that batches can be formed.

    Raises:
        InputError: There is no tokenizer, or its files are damaged.
    """
    from transformers import AutoTokenizer

    place = tokenizer_directory(checkpoint)
    with quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a damaged tokenizer.json surfaces as a bare Exception from its Rust reader
            raise InputError(
                f"{place}: its tokenizer cannot be loaded ({_first_line(error)})", "check its tokenizer files"
            ) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    found: PreTrainedTokenizerBase = tokenizer
    return found


def tokenizer_directory(checkpoint: Checkpoint) -> Path:
    """Where a checkpoint's tokenizer files are: the adapter's directory if it has any, else the model's."""
    own = any((checkpoint.path / name).is_file() for name in _TOKENIZER_MARKS)
    return checkpoint.path if own or checkpoint.base is None else checkpoint.base.path


def inject_adapter(model: Any, adapter: Checkpoint) -> dict[str, list[tuple[str, str]]]:
    """Puts an adapter into its base model, in place, unmerged and in evaluation mode.

    Args:
        model: The base model, without adapters.
        adapter: An adapter whose layers are inside the model, of any kind that PEFT knows.

    Returns:
        Name of a tensor in the adapter's file → where it is in the model: the outermost of PEFT's layers around it (or
        the model's own module that it belongs to), and its name in there. Tied layers may hold one both.

    Raises:
        InputError: PEFT cannot load the adapter.
    """
    from peft import get_peft_model_state_dict

    check_loads(adapter)
    with quiet():
        wrapped = _with_adapter(model, adapter, merge=False)
    # The same memory, whatever each kind of adapter calls its tensors in files and in layers.
    held: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        held.setdefault(tensor.data_ptr(), []).append(name)
    with quiet():
        stored = get_peft_model_state_dict(wrapped, save_embedding_layers=True)
    places = {name: held.get(tensor.data_ptr(), []) for name, tensor in stored.items()}
    return {name: [_layer_of(model, parameter) for parameter in found] for name, found in places.items() if found}


def _layer_of(model: Any, parameter: str) -> tuple[str, str]:
    """The outermost of PEFT's layers around a parameter, else the module that it belongs to; its name in there."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    parts = parameter.split(".")
    paths = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    layers = (
        path for path in paths if isinstance(model.get_submodule(path), BaseTunerLayer | AuxiliaryTrainingWrapper)
    )
    layer = next(layers, paths[-1] if paths else "")
    return layer, parameter.removeprefix(f"{layer}.")


def _with_adapter(model: Any, adapter: Checkpoint, merge: bool) -> Any:
    """PEFT's model on the base, merged if asked."""
    from peft import PeftModel

    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(adapter.downloaded()))
        return merged_adapter(wrapped, adapter) if merge else wrapped
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        what = "merge it into" if merge else "put it into"
        raise InputError(
            f"{adapter.path}: PEFT cannot {what} its base ({_first_line(error)})",
            "check its adapter_config.json and PEFT's version; what PEFT does not merge can be masked in its own "
            "tensors (space: factors)",
        ) from error


def merged_adapter(wrapped: Any, adapter: Checkpoint) -> Any:
    """The base of a PEFT model with its adapter merged into it, in place; what is tied stays so while it is equal.

    Raises:
        InputError: The adapter puts tokens before the prompt, in place of changing layers.
    """
    if wrapped.active_peft_config.is_prompt_learning:
        raise InputError(
            f"{adapter.reference}: {wrapped.peft_type.value} puts tokens before the prompt and changes no layer: "
            "no weights are those of the tuned model",
            "tune an adapter of layers, for example LoRA",
        )
    tied = wrapped.get_base_model().config.get_text_config().tie_word_embeddings
    _part_ties(wrapped)
    merged = wrapped.merge_and_unload()
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if tied and head is not None and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight  # the adapters were tied, too
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = True  # PEFT has unset it, and files that name no output layer would not load
    return merged


def _part_ties(model: Any) -> None:
    """Gives an adapter's layer a copy of a weight that another module has, too.

    What is merged into the embedding would otherwise change a tied output layer, and into a layer its repetitions,
    which it did not while the adapter was trained.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen: dict[int, int] = {}
    for _, weight in model.named_parameters(remove_duplicate=False):
        seen[id(weight)] = seen.get(id(weight), 0) + 1
    for layer in model.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        for name, weight in list(base.named_parameters(recurse=False)) if base is not None else ():
            if seen[id(weight)] > 1:
                setattr(base, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))


def _unloadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: cannot be loaded as a causal language model ({_first_line(error)})", "check its config.json"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
