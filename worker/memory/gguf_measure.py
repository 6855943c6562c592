"""
How many bytes has each piece of a GGUF model? Exactly, from the header of its file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from worker.catalog.tensors import GgufHeader, Tensor
from worker.memory.gguf import GgufModel, GgufWeights
from worker.memory.gguf_caches import WITHOUT_CACHE, GgufFacts, head_size, read_caches

_LAYER = re.compile(r"blk\.(\d+)\.")
# llama.cpp, LLM_TENSOR_INFOS: what is looked up by token or position, and what belongs to the first layer.
_INPUT = ("token_embd.", "position_embd.", "token_types.", "per_layer_token_embd.")
_FIRST_LAYER = ("token_embd_norm.", "rope_freqs.", "per_layer_model_proj.", "per_layer_proj_norm.")


def measure_gguf(header: GgufHeader) -> GgufModel:
    """
    Say what the model is made of; never raises: what the file leaves open is in `unknown`.

    Bytes are those of the tensors; llama.cpp rounds each up to 128 at most when it places them.
    """
    facts = GgufFacts(header.metadata)
    caches = read_caches(facts)
    heads = facts.of_layers("attention.head_count") or (0,)
    return GgufModel(
        kind=facts.kind,
        weights=_weights(header.tensors, facts),
        caches=caches,
        hidden_size=facts.needed("embedding_length"),
        vocab_size=_vocabulary(header),
        heads=max(heads, default=0),
        query_width=max(heads, default=0) * head_size(facts) if any(heads) else 0,
        feed_forward=_feed_forward(facts),
        context_length=facts.number("context_length"),
        unknown=tuple(facts.unknown),
    )


def _weights(tensors: Iterable[Tensor], facts: GgufFacts) -> GgufWeights | None:
    by_layer: Counter[int] = Counter()
    embedding = output = largest = token_table = 0
    names = set()
    loaded = facts.layers - (facts.number("nextn_predict_layers") or 0)
    for tensor in tensors:
        names.add(tensor.name)
        if (found := _LAYER.match(tensor.name)) is not None:
            layer = int(found[1])
            if layer >= facts.layers:
                facts.note(f"a tensor of layer {layer} in a model of {facts.layers}")
            elif layer < loaded:
                by_layer[layer] += tensor.nbytes
                largest = max(largest, tensor.nbytes)
        elif tensor.name.startswith(_INPUT):
            embedding += tensor.nbytes
            token_table += tensor.nbytes if tensor.name == "token_embd.weight" else 0
        elif tensor.name.startswith(_FIRST_LAYER):
            by_layer[0] += tensor.nbytes
        else:
            output += tensor.nbytes
    if not embedding:
        facts.note("token_embd.weight")
        return None
    tied = "output.weight" not in names and facts.kind not in WITHOUT_CACHE  # encoders have no head at all
    return GgufWeights(
        embedding=embedding,
        layers=tuple(by_layer[layer] for layer in range(facts.layers)),
        output=output + (token_table if tied else 0),
        head_shared=token_table if tied else 0,
        largest_tensor=largest,
    )


def _vocabulary(header: GgufHeader) -> int:
    """Rows of the table of tokens; it may be longer than the list of tokens."""
    table = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    return table.shape[0] if table is not None and table.shape else 0


def _feed_forward(facts: GgufFacts) -> int:
    dense = max(facts.of_layers("feed_forward_length") or (0,), default=0)
    used = max(facts.of_layers("expert_used_count") or (0,), default=0)
    expert = max(facts.of_layers("expert_feed_forward_length") or (0,), default=0)
    return max(dense, used * expert)
