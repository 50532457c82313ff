"""The peers of ``peers.py`` in PyTorch: transformers' Mixtral, and a loop over experts. Not a benchmark of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import torch  # pyrefly: ignore[missing-import]
import torch_decoder
import transformers  # pyrefly: ignore[missing-import]
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # pyrefly: ignore[missing-import]

from moe_jax.model.decoder import Decoder, Tokens, Variables, unstack
from moe_jax.model.machine import this_machine
from moe_jax.model.moe.backends import for_machine

# A shape is a Case of peers.py, which runs as a script and so cannot be imported as a module.
Losses = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]
"""Token ids [B, L] to logits and what is added to their cross-entropy."""


def mixtral(shape: Any, vocab_size: int) -> Any:
    """A new Mixtral of that shape."""
    torch.manual_seed(0)
    model = shape.config.model
    config = transformers.MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=model.embed_dim,
        intermediate_size=shape.expert_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2 * shape.context,
        num_local_experts=shape.experts,
        num_experts_per_tok=model.moe.top_k,
        output_router_logits=not shape.samples,
        use_cache=shape.samples,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def sampling(shape: Any, num_tokens: int) -> Callable[[], None]:
    """A function that draws ``num_tokens`` after as many, for each text of a batch."""
    vocab_size = 2005  # as ours, of 2,000 characters and special tokens
    model = mixtral(shape, vocab_size)
    prompt_BL = torch.randint(1, vocab_size, (shape.batch, num_tokens))
    how = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0, "eos_token_id": None}

    def sample() -> None:
        with torch.inference_mode():
            mask_BL = torch.ones_like(prompt_BL)
            model.generate(prompt_BL, attention_mask=mask_BL, max_new_tokens=num_tokens, **how)

    return sample


def training(peer: str, shape: Any, vocab_size: int, batches: Iterator[dict[str, Any]]) -> Callable[[], float]:
    """A function that makes one optimizer step and returns its cross-entropy."""
    parameters, losses = {"mixtral": _mixtral_losses, "loop": _loop_losses}[peer](shape, vocab_size)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def train() -> float:
        batch = {name: torch.from_numpy(array).long() for name, array in next(batches).items()}
        logits_BLV, more = losses(batch["inputs"])
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), batch["targets"].flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + more).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return train


def _mixtral_losses(shape: Any, vocab_size: int) -> tuple[list[torch.Tensor], Losses]:
    model = mixtral(shape, vocab_size).train()

    def losses(inputs_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(input_ids=inputs_BL)
        balancing = load_balancing_loss_func(output.router_logits, shape.experts, model.config.num_experts_per_tok)
        return output.logits, shape.balancing * balancing

    return list(model.parameters()), losses


def _loop_losses(shape: Any, vocab_size: int) -> tuple[list[torch.Tensor], Losses]:
    model = for_machine(shape.config.model, 2, train=True, machine=this_machine())
    assert torch_decoder.is_of_this_kind(model)
    params = Decoder(model, vocab_size).init(jax.random.key(0), Tokens(jnp.zeros((1, 2), jnp.int32)))["params"]
    weights = torch_decoder.as_tensors(unstack(Variables(nn.unbox(params)), model).params)
    leaves = [leaf.requires_grad_() for leaf in jax.tree.leaves(weights)]
    return leaves, lambda inputs_BL: (torch_decoder.logits_of(model, weights, inputs_BL), 0.0)
