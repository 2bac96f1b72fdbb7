"""Weights at rest: references, headers, lazy readers, adapters, GGUF in, loading and writing."""

from resafe.checkpoints.adapter import (
    AdapterModule,
    adapter_modules,
    base_tensor,
    check_adapter_fits,
    check_additive,
    check_layers,
    check_loads,
    rewriting_start,
)
from resafe.checkpoints.blocks import Blocks
from resafe.checkpoints.cachedir import cache_root
from resafe.checkpoints.compare import check_same_shapes, tied_copies
from resafe.checkpoints.gguf import convert_gguf
from resafe.checkpoints.hashing import cached_digest
from resafe.checkpoints.header import TensorInfo, read_header
from resafe.checkpoints.loading import inject_adapter, load_model, load_tokenizer, merged_adapter, quiet
from resafe.checkpoints.pieces import Pieces, parameter_pieces
from resafe.checkpoints.precision import Precision, resolve_dtype
from resafe.checkpoints.reader import Checkpoint, known_digest, open_checkpoint
from resafe.checkpoints.reference import Reference, parse_output, parse_reference
from resafe.checkpoints.sizes import parse_size, show_size
from resafe.checkpoints.staging import ensure_space, staged
from resafe.checkpoints.storage import File, Prefix, RemoteFile, is_remote, open_prefix
from resafe.checkpoints.writer import save_adapter, save_model

__all__ = [
    "AdapterModule",
    "Blocks",
    "Checkpoint",
    "File",
    "Pieces",
    "Precision",
    "Prefix",
    "Reference",
    "RemoteFile",
    "TensorInfo",
    "adapter_modules",
    "base_tensor",
    "cache_root",
    "cached_digest",
    "check_adapter_fits",
    "check_additive",
    "check_layers",
    "check_loads",
    "check_same_shapes",
    "convert_gguf",
    "ensure_space",
    "inject_adapter",
    "is_remote",
    "known_digest",
    "load_model",
    "load_tokenizer",
    "merged_adapter",
    "open_checkpoint",
    "open_prefix",
    "parameter_pieces",
    "parse_output",
    "parse_reference",
    "parse_size",
    "quiet",
    "read_header",
    "resolve_dtype",
    "rewriting_start",
    "save_adapter",
    "save_model",
    "show_size",
    "staged",
    "tied_copies",
]
