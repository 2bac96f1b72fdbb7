"""Several adapters on one loaded base: loaded once, each adapter merged into copies of the weights that it changes.

Merging keeps decoding as fast as a plain model's and gives, bit for bit, the model that loading base and adapter
together gives. Knows checkpoints and modules; knows no question.
"""

from __future__ import annotations

from typing import Any

from resafe.checkpoints import Checkpoint, Precision, check_loads, load_model, merged_adapter, quiet, rewriting_start
from resafe.errors import InputError


class SharedBase:
    """A base model in memory that becomes one of its adapters' models after another.

    Args:
        base: The plain model's checkpoint.
        dtype: Precision of the weights in memory.
        device: Where the model goes.
    """

    def __init__(self, base: Checkpoint, *, dtype: Precision = "auto", device: str = "cpu") -> None:
        self.base, self._dtype, self._device = base, dtype, device
        self._model: Any = None
        self._modules: dict[str, Any] = {}
        self._weights: dict[str, tuple[Any, Any]] = {}
        self._config: dict[str, Any] = {}
        self.loads = 0

    def model(self, checkpoint: Checkpoint) -> Any:
        """The model of the base, or of an adapter on it; valid until the next call.

        Args:
            checkpoint: The base itself, or an adapter whose base it is.

        Raises:
            InputError: The adapter belongs to another base, or its files do not fit.
        """
        if self._model is None:
            self._model = load_model(self.base, dtype=self._dtype, device=self._device)
            self._modules = dict(self._model.named_modules())
            every = self._model.named_parameters(remove_duplicate=False)  # merging parts those that are tied
            self._weights = {name: (weight, weight.data) for name, weight in every}
            self._config = dict(vars(self._model.config))
            self.loads += 1
        self._restore()
        if checkpoint.kind == "adapter":
            self._merge(checkpoint)
        return self._model.eval()

    def release(self) -> None:
        """Lets go of the model."""
        self._model, self._modules, self._weights = None, {}, {}

    def _merge(self, adapter: Checkpoint) -> None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        if adapter.base is None or adapter.base.path != self.base.path:
            raise InputError(f"{adapter.reference}: does not sit on {self.base.reference}", "give it with its base")
        check_loads(adapter)
        rewritten = rewriting_start(adapter.config) is not None  # in place, and so are trained biases loaded
        for name, (weight, data) in self._weights.items():
            if rewritten or name.endswith("bias"):
                weight.data = data.clone()
        with quiet():
            try:
                wrapped: Any = PeftModel.from_pretrained(self._model, str(adapter.downloaded()))
                for module in wrapped.modules():
                    if isinstance(module, BaseTunerLayer):
                        for weight in module.get_base_layer().parameters():
                            weight.data = weight.data.clone()  # merged into; the base's own stays as it is
                self._model = merged_adapter(wrapped, adapter)
            except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.release()  # half changed
                raise InputError(
                    f"{adapter.path}: cannot be put on its base ({reason})", "check its adapter_config.json"
                ) from error

    def _restore(self) -> None:
        """Puts the base's own modules, weights and configuration back."""
        vars(self._model.config).update(self._config)  # whether it is tied, how many layers it has
        for name, module in self._modules.items():
            parent, _, last = name.rpartition(".")
            if name and getattr(self._modules[parent], last, None) is not module:
                setattr(self._modules[parent], last, module)
        for name, (weight, data) in self._weights.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self._modules[owner], leaf, weight)
            weight.data = data
