"""How vLLM takes a policy's published weights, in place. Needs vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "rlhf"


@dataclass
class Update(WeightTransferUpdateInfo):
    """All parameters of a policy, by the names and in the shapes of its saved model."""

    weights: Mapping[str, torch.Tensor]


class PublishedWeights(WeightTransferEngine[WeightTransferInitInfo, Update]):
    """Loads weights that are given in the update itself, in the checkpoint's format, into vLLM's own layers."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = Update

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        pass  # nothing is kept open

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        """
        Raises:
            ValueError: vLLM's model has parameters that none of the weights went to; it names them.
        """
        taken = self.model.load_weights(iter(update_info.weights.items()))
        tied = {"lm_head.weight"} if self._tied else set()
        missing = sorted({name for name, _ in self.model.named_parameters()} - set(taken or ()) - tied)
        if taken is not None and missing:
            raise ValueError(f"vLLM took no weights for {', '.join(missing[:4])}")

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if head is not None and self._tied:  # on CPUs it has a packed copy of the embedding's weight
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass

    @property
    def _tied(self) -> bool:
        """Whether the head's weight is the embedding's, which a checkpoint has once."""
        return bool(getattr(self.model_config.hf_config.get_text_config(), "tie_word_embeddings", False))


def register() -> None:
    """Makes the backend known to vLLM, in this process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, PublishedWeights)
