# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How a sparse Mixture-of-Experts language model works
#
# Seven parts, from text to text: each shows one idea by a few naive lines, next to the function of the package that
# does the same for real, and asserts that both agree. A part begins with its own imports and needs no other part.
#
# Run it as a script, `python docs/walkthrough.py` (a minute or two), or as a notebook: editors that know the `# %%`
# cells open this file as one, and `jupytext --to notebook docs/walkthrough.py` makes one.
#
# An array's name ends in its axes, by the legend in `moe_jax/axes.py`: `router_logits_TE` is tokens by experts.

# %%
import os
import sys
from pathlib import Path

# The repository's root, so that the package need not be installed; and a CPU, the quickest for small arrays.
sys.path[:0] = [str(folder) for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "moe_jax").is_dir()]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# %% [markdown]
# ## 1. Data and tokenizer
#
# A language model reads whole numbers, so a tokenizer cuts the text into pieces and numbers them. The text here is
# one of the 38 plays that come with the installation.

# %%
import tempfile
from pathlib import Path

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.batches import train_batches
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.plays import find_plays, render_play
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.tokenizer import build_tokenizer

text = render_play(dict(find_plays())["the-comedy-of-errors"].read_text(encoding="utf-8"))
print(text[1000:1200])

# %% [markdown]
# `char` gives every character of the text a number. `bpe:512` starts from single bytes and joins the most frequent
# pair of neighbours, again and again, until it has 512 different tokens: the same text in fewer tokens, so that a
# context of as many tokens reaches further back.

# %%
characters = sorted(set(text))
char, bpe = build_tokenizer("char", [text]), build_tokenizer("bpe:512", [text])
line = "The merchant is a man of Syracuse."

assert char.encode(line).tolist() == [characters.index(character) for character in line]
for tokenizer in (char, bpe):
    ids = tokenizer.encode(line)
    assert tokenizer.decode(ids.tolist()) == line
    print(tokenizer.name, tokenizer.vocab_size, "tokens;", [tokenizer.decode([index]) for index in ids.tolist()])
assert len(bpe.encode(text)) < 0.6 * len(char.encode(text))

# %% [markdown]
# Text is tokenized once, into a folder, where training finds a stream of tokens. A training row is a window of L + 1
# tokens from anywhere in the stream: the first L are the inputs, the last L the targets, so that at every place the
# target is the token that comes next.

# %%
folder = tempfile.TemporaryDirectory()
Path(folder.name, "play.txt").write_text(text, encoding="utf-8")
data = prepare_folder(PrepareConfig((f"{folder.name}/play.txt",), out=f"{folder.name}/data", tokenizer="char"))
split = data.corpora[0].train
windows = np.lib.stride_tricks.sliding_window_view(split.stream().read(0, split.num_tokens), 17)
with train_batches(data, DataConfig(batch_size=4), context_length=16) as batches:
    batch = next(batches)
for inputs_L, targets_L in zip(batch["inputs"], batch["targets"], strict=True):
    print(repr(data.tokenizer.decode(inputs_L.tolist())), "->", repr(data.tokenizer.decode(targets_L.tolist())))
    assert (inputs_L[1:] == targets_L[:-1]).all()
    assert (windows == np.append(inputs_L, targets_L[-1])).all(axis=1).any(), "a window of the stream"
folder.cleanup()

# %% [markdown]
# ## 2. Attention
#
# Attention is how a token learns of others. Each token asks a *query*, offers a *key*, and carries a *value*; it takes
# the mean of the values, weighted by how well its query fits their keys. A language model predicts the next token, so
# a token may see itself and earlier ones only: the causal mask.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.model.attention import attend, causal_mask

L, H, A = 8, 2, 16  # tokens, heads, width of a head
query_LHA, key_LHA, value_LHA = jax.random.normal(jax.random.key(0), (3, L, H, A))
mask_BLM = causal_mask(jnp.arange(L)[None])
assert (mask_BLM[0] == np.tril(np.ones((L, L), bool))).all()


def one_head(query_LA, key_LA, value_LA):
    """The weights [query, key], each row summing to one, and the weighted means of the values."""
    scores_LM = query_LA @ key_LA.T / np.sqrt(A)
    scores_LM = jnp.where(np.tril(np.ones((L, L), bool)), scores_LM, -jnp.inf)
    weights_LM = jnp.exp(scores_LM) / jnp.sum(jnp.exp(scores_LM), axis=1, keepdims=True)
    return weights_LM, weights_LM @ value_LA


def attention(query_LHA, key_LHA, value_LHA):
    """The package's, of one sequence: its keys and values have the heads in front."""
    return attend(query_LHA[None], key_LHA.swapaxes(0, 1)[None], value_LHA.swapaxes(0, 1)[None], mask_BLM, None)[0]


out_LHA = attention(query_LHA, key_LHA, value_LHA)
for head in range(H):
    weights_LM, by_hand_LA = one_head(query_LHA[:, head], key_LHA[:, head], value_LHA[:, head])
    np.testing.assert_allclose(out_LHA[:, head], by_hand_LA, rtol=1e-5, atol=1e-5)
    assert (weights_LM[np.triu_indices(L, 1)] == 0).all()
np.testing.assert_allclose(out_LHA[0], value_LHA[0], rtol=1e-6)  # the first token sees itself alone

# %% [markdown]
# The weights of the last head: each row is a token that looks, each column one that is looked at. Nothing lies above
# the diagonal.

# %%
figure, axes = plt.subplots(figsize=(4, 3.4), layout="constrained")
axes.set(title="attention weights of one head", xlabel="key: looked at", ylabel="query: looks")
image = axes.imshow(weights_LM, cmap="Blues", vmin=0, vmax=1)
bar = figure.colorbar(image, ax=axes)

# %% [markdown]
# What may a token see? Change the last token, and nothing before it moves: a model so made never sees what it is
# asked to predict.

# %%
changed = [array.at[-1].add(1.0) for array in (query_LHA, key_LHA, value_LHA)]
changed_LHA = attention(*changed)
assert (changed_LHA[:-1] == out_LHA[:-1]).all()
assert not np.allclose(changed_LHA[-1], out_LHA[-1])

# %% [markdown]
# ## 3. Router
#
# A dense model sends each token through one large MLP. A sparse one has E small MLPs, the experts, and sends a token
# to K of them: more parameters for the same work. The router decides: one matrix, which gives each token one score,
# or logit, for each expert.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.model.moe.routing import noisy_logits, top_k_plan

T, D, E, K = 12, 16, 4, 2  # tokens, model width, experts, experts a token
x_TD = jax.random.normal(jax.random.key(0), (T, D))
router_DE = jax.random.normal(jax.random.key(1), (D, E)) / np.sqrt(D)
router_logits_TE = x_TD @ router_DE


def route(logits_E):
    """The K experts of one token, best first, and the weights of their outputs."""
    probs_E = np.exp(logits_E) / np.sum(np.exp(logits_E))
    experts_K = np.argsort(-probs_E, kind="stable")[:K]
    return experts_K, probs_E[experts_K] / np.sum(probs_E[experts_K])


plan = top_k_plan(router_logits_TE, K)
for token in range(T):
    experts_K, weights_K = route(np.asarray(router_logits_TE[token]))
    assert (plan.expert_TK[token] == experts_K).all()
    np.testing.assert_allclose(plan.combine_weight_TK[token], weights_K, rtol=1e-5)
print("token 0 goes to experts", plan.expert_TK[0], "with weights", plan.combine_weight_TK[0])

# %% [markdown]
# A softmax over the chosen logits alone gives the same weights as a softmax over all that is then divided by its sum
# over the chosen. With K = 1 such a weight would be 1 whatever the score, and the router would have no gradient, so
# there the weight is the probability itself.

# %%
chosen_logits_TK = jnp.take_along_axis(router_logits_TE, plan.expert_TK, axis=1)
np.testing.assert_allclose(plan.combine_weight_TK, jax.nn.softmax(chosen_logits_TK), rtol=1e-5)
probs_TE = jax.nn.softmax(router_logits_TE)
best_TK = top_k_plan(router_logits_TE, 1).combine_weight_TK
np.testing.assert_allclose(best_TK[:, 0], jnp.max(probs_TE, axis=1), rtol=1e-5)

# %% [markdown]
# Left, what the router believes; right, the combine weights: the same, cut to two experts a token and scaled to sum to
# one. The output of the layer is this weighted sum of the experts' outputs.

# %%
combine_TE = jnp.zeros((T, E)).at[jnp.arange(T)[:, None], plan.expert_TK].set(plan.combine_weight_TK)
assert (jnp.sum(combine_TE > 0, axis=1) == K).all()
np.testing.assert_allclose(jnp.sum(combine_TE, axis=1), 1.0, rtol=1e-5)
figure, both_axes = plt.subplots(1, 2, figsize=(6, 4), layout="constrained")
shown = {"probabilities": probs_TE, "combine weights": combine_TE}
for axes, (title, values_TE) in zip(both_axes, shown.items(), strict=True):
    axes.set(title=title, xlabel="expert", ylabel="token", xticks=range(E))
    image = axes.imshow(values_TE, cmap="Blues", vmin=0, vmax=1, aspect="auto")

# %% [markdown]
# *Noisy* top-k adds noise of a learned scale in training, so that an expert that is nearly as good is tried at times.
# In evaluation there is none.

# %%
noise_scale_TE = jnp.zeros((T, E))  # x·W_noise; training starts here, where the noise has a scale of ln 2
noise_key = jax.random.key(2)
noisy_TE = noisy_logits(router_logits_TE, noise_scale_TE, noise_key)
noise_TE = jax.random.normal(noise_key, (T, E))
np.testing.assert_allclose(noisy_TE, router_logits_TE + noise_TE * np.log(1 + np.exp(0.0)), rtol=1e-5, atol=1e-6)
is_moved_T = jnp.any(jnp.sort(top_k_plan(noisy_TE, K).expert_TK) != jnp.sort(plan.expert_TK), axis=1)
assert 0 < int(is_moved_T.sum()) < T
print(f"noise sends {int(is_moved_T.sum())} of {T} tokens to other experts")

# %% [markdown]
# A plan is a value: a small tree of arrays that says which token goes where, with what weight, and what the router did
# on the whole. It says nothing of how rows move; that is part 4. Padding is masked: such a token goes nowhere (expert
# E, one past the last) and counts in no statistic.

# %%
print(jax.tree.map(jnp.shape, plan))
load_E = np.bincount(np.asarray(plan.expert_TK).reshape(-1), minlength=E)
assert (plan.statistics.load_E == load_E).all()
assert load_E.sum() == T * K

masked = top_k_plan(router_logits_TE, K, token_mask_T=jnp.arange(T) < T - 2)
assert (masked.expert_TK[-2:] == E).all()
assert masked.statistics.num_tokens == T - 2

# %% [markdown]
# ## 4. Dispatch and capacity
#
# A *row* is a token on its way to one of its experts. The backend brings rows to experts and the weighted results
# back. The naive way is a loop over tokens and choices, one row at a time.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.config import MoEConfig
from moe_jax.model.mlp import ExpertWeights
from moe_jax.model.moe.backends import BACKENDS
from moe_jax.model.moe.plan import place
from moe_jax.model.moe.routing import expert_capacity, top_k_plan

T, D, F, E, K = 16, 8, 32, 4, 2  # tokens, model width, expert width, experts, experts a token
keys = jax.random.split(jax.random.key(0), 4)
x_TD = jax.random.normal(keys[0], (T, D))
weights = ExpertWeights(
    w_up_EDF=0.3 * jax.random.normal(keys[1], (E, D, F)), w_down_EFD=0.3 * jax.random.normal(keys[2], (E, F, D))
)
plan = top_k_plan(x_TD @ jax.random.normal(keys[3], (D, E)), K)


def one_by_one(kept_TK):
    """y_t = Σ over kept rows of weight · w_down(relu(w_up x_t))."""
    x, up, down, expert_TK, weight_TK = map(
        np.asarray, (x_TD, weights.w_up_EDF, weights.w_down_EFD, plan.expert_TK, plan.combine_weight_TK)
    )
    y_TD = np.zeros((T, D))
    for token, choice in np.argwhere(kept_TK):
        expert = expert_TK[token, choice]
        y_TD[token] += weight_TK[token, choice] * (np.maximum(x[token] @ up[expert], 0.0) @ down[expert])
    return y_TD


# %% [markdown]
# Fast ways move all rows at once. `einsum` gives every expert C slots and multiplies by one-hot masks [T, E, C]: the
# clearest, at a cost that grows with T². `gather` reads rows into the same slots by index. `blocked` sorts the rows,
# one expert after the other, as many as there are, and needs no slots. With C = T nothing is dropped, and all agree.
#
# Backends take groups of tokens, one a sequence: [G, T, D]; here is one group.

# %%
groups = jax.tree.map(lambda leaf: leaf[None], (x_TD, plan))
for name in ("einsum", "gather", "blocked"):
    y_GTD, kept_GTK = BACKENDS[name].run(*groups, weights, "relu", T)
    assert kept_GTK.all()
    np.testing.assert_allclose(y_GTD[0], one_by_one(kept_GTK[0]), rtol=1e-4, atol=1e-5)

# %% [markdown]
# Slots cost work even where they are empty, so in training an expert may be given a *capacity* of fewer:
# C = T·K/E · capacity_factor, rounded up. What is over is dropped, and the token goes on by the residual stream alone.

# %%
moe = MoEConfig(num_experts=E, top_k=K, capacity_factor=0.75)
C = expert_capacity(moe, T, train=True)
assert np.ceil(T * K / E * 0.75) == C
assert expert_capacity(moe, T, train=False) == T, "in evaluation nothing is dropped"

placement = place(plan.expert_TK, E, C)
for name in ("einsum", "gather"):
    y_GTD, kept_GTK = BACKENDS[name].run(*groups, weights, "relu", C)
    assert (kept_GTK[0] == placement.kept_TK).all()
    np.testing.assert_allclose(y_GTD[0], one_by_one(placement.kept_TK), rtol=1e-4, atol=1e-5)
assert placement.kept_TK[:C].all(), "an expert is full only after C tokens"
num_dropped = int(jnp.sum(~placement.kept_TK))
assert num_dropped == np.maximum(plan.statistics.load_E - C, 0).sum() > 0

# %% [markdown]
# Every row that was sent: blue is kept, red is dropped. Experts fill from the first token on, so drops come late.

# %%
sent_TE = np.full((T, E), np.nan)
np.put_along_axis(sent_TE, np.asarray(plan.expert_TK), np.asarray(placement.kept_TK, float), axis=1)
figure, axes = plt.subplots(figsize=(3.2, 4.4), layout="constrained")
axes.set(title=f"{num_dropped} of {T * K} rows dropped, C = {C}", xlabel="expert", ylabel="token", xticks=range(E))
image = axes.imshow(sent_TE, cmap="RdBu", vmin=-0.3, vmax=1.3, aspect="auto")

# %% [markdown]
# Which rows are dropped matters. Here capacity is given out row by row, in either of two orders: token by token, as
# this package does, or all first choices before all second ones, as is common for images. In the second a later token
# can take the place of an earlier one. A language model would then see, by what was dropped, what it is to predict.


# %%
def keep(expert_TK, capacity, rows):
    """[T, K] bool: ``rows``, pairs of token and choice, fill the experts in their order."""
    kept_TK, used_E = np.zeros(expert_TK.shape, bool), np.zeros(E, int)
    for token, choice in rows:
        expert = expert_TK[token, choice]
        kept_TK[token, choice] = used_E[expert] < capacity
        used_E[expert] += 1
    return kept_TK


first_TK = np.array([[0, 1], [2, 1], [3, 0], [3, 2]])
other_TK = np.array([[0, 1], [2, 1], [3, 0], [1, 2]])  # another last token, whose first choice is expert 1
by_token = [(token, choice) for token in range(4) for choice in range(K)]
by_choice = sorted(by_token, key=lambda row: row[1])

assert (keep(first_TK, 2, by_token)[:-1] == keep(other_TK, 2, by_token)[:-1]).all()
assert keep(first_TK, 2, by_choice)[1, 1]
assert not keep(other_TK, 2, by_choice)[1, 1], "token 1 lost its second expert to token 3: the future leaks"
assert (place(jnp.asarray(first_TK), E, 2).kept_TK == keep(first_TK, 2, by_token)).all()

# %% [markdown]
# The same of the real thing, whatever the last token becomes: outputs and kept rows before it stay as they are.

# %%
y_GTD, kept_GTK = BACKENDS["gather"].run(*groups, weights, "relu", C)
for seed in range(5):
    other_TD = x_TD.at[-1].set(jax.random.normal(jax.random.key(seed), (D,)))
    other_plan = top_k_plan(other_TD @ jax.random.normal(keys[3], (D, E)), K)
    other = jax.tree.map(lambda leaf: leaf[None], (other_TD, other_plan))
    other_GTD, other_GTK = BACKENDS["gather"].run(*other, weights, "relu", C)
    assert (other_GTK[0, :-1] == kept_GTK[0, :-1]).all()
    np.testing.assert_allclose(other_GTD[0, :-1], y_GTD[0, :-1], rtol=1e-6)

# %% [markdown]
# ## 5. Balance
#
# Nothing so far keeps the router from sending every token to the same experts, and left alone it may: an expert that
# is chosen learns, and is chosen more. Its *load* is the number of rows it gets. The load-balancing loss multiplies
# each expert's share of the rows by its mean probability, and sums: `E · Σ_e f_e · p_e`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.model.moe.routing import top_k_plan
from moe_jax.model.moe.statistics import importance_loss, load_balancing_loss, router_z_loss

T, D, E, K = 256, 16, 4, 2  # tokens, model width, experts, experts a token


def statistics(router_logits_TE):
    """Of one group; the losses take any number of groups, on a leading axis."""
    return jax.tree.map(lambda leaf: leaf[None], top_k_plan(router_logits_TE, K).statistics)


def balancing(router_logits_TE):
    return load_balancing_loss(statistics(router_logits_TE), "sequence", 1)


def naive_balancing(router_logits_TE):
    expert_TK = np.argsort(-np.asarray(router_logits_TE), axis=1, kind="stable")[:, :K]
    f_E = np.bincount(expert_TK.reshape(-1), minlength=E) / (T * K)
    return E * np.sum(f_E * np.mean(jax.nn.softmax(router_logits_TE), axis=0))


random_TE = jax.random.normal(jax.random.key(0), (T, E))
np.testing.assert_allclose(balancing(random_TE), naive_balancing(random_TE), rtol=1e-5)

# %% [markdown]
# It is 1 where the load is balanced, for any K, and E/K where all tokens go surely to the same K experts.

# %%
balanced_TE = 5.0 * (jax.nn.one_hot(jnp.arange(T) % E, E) + jax.nn.one_hot((jnp.arange(T) + 1) % E, E))
worst_TE = jnp.broadcast_to(jnp.where(jnp.arange(E) < K, 20.0, 0.0), (T, E))
assert (statistics(balanced_TE).load_E == T * K / E).all()
np.testing.assert_allclose(balancing(balanced_TE), 1.0, rtol=1e-5)
np.testing.assert_allclose(balancing(worst_TE), E / K, rtol=1e-5)

# %% [markdown]
# Counts have no gradient, probabilities have: the loss pushes down the probability of each expert in proportion to its
# load. Watch a skewed router recover. Every token has a feature that is always 1, and its row of the router makes
# expert 0 everybody's favourite, as a lucky expert becomes in training.

# %%
x_TD = jax.random.normal(jax.random.key(1), (T, D)).at[:, 0].set(1.0)
router_DE = (0.5 * jax.random.normal(jax.random.key(2), (D, E))).at[0].set(jnp.array([4.0, 1.0, 0.0, 0.0]))


@jax.jit
def descend(router_DE):
    loss, gradient_DE = jax.value_and_grad(lambda router_DE: balancing(x_TD @ router_DE))(router_DE)
    return loss, statistics(x_TD @ router_DE).load_E[0] / (T * K), router_DE - 2.0 * gradient_DE


losses_S, loads_SE = [], []
for _ in range(40):
    loss, load_E, router_DE = descend(router_DE)
    losses_S.append(float(loss))
    loads_SE.append(np.asarray(load_E))
print("shares of rows before", loads_SE[0].round(3), "and after", loads_SE[-1].round(3))
assert losses_S[0] > 1.3
assert abs(losses_S[-1] - 1.0) < 0.02
assert loads_SE[0].max() > 0.45, "half of all rows is the most that one of two experts a token can get"
assert loads_SE[-1].max() < 0.3

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.set(title="load-balancing loss", xlabel="step")
right.set(title="share of rows, by expert", xlabel="step", ylim=(0, 0.55))
lines = left.plot(losses_S) + right.plot(loads_SE)
line = right.axhline(1 / E, color="0.5", linestyle="--")

# %% [markdown]
# Two more. The *importance* loss is the squared coefficient of variation of the summed probabilities: 0 when balanced.
# The router *z-loss* is the mean of `logsumexp(router_logits)²`: adding the same number to all logits changes no
# probability, and the z-loss keeps them from drifting to where float32 is coarse.

# %%
importance_E = np.sum(jax.nn.softmax(random_TE), axis=0)
naive_importance = np.var(importance_E) / np.mean(importance_E) ** 2
np.testing.assert_allclose(importance_loss(statistics(random_TE), "sequence", 1), naive_importance, rtol=1e-3)
np.testing.assert_allclose(importance_loss(statistics(balanced_TE), "sequence", 1), 0.0, atol=1e-6)

naive_z = np.mean(np.log(np.sum(np.exp(random_TE), axis=1)) ** 2)
np.testing.assert_allclose(router_z_loss(statistics(random_TE), T), naive_z, rtol=1e-5)
np.testing.assert_allclose(balancing(random_TE + 10.0), balancing(random_TE), rtol=1e-5)
assert router_z_loss(statistics(random_TE + 10.0), T) > 20 * naive_z

# %% [markdown]
# ## 6. Training
#
# A tiny model of one play's characters, by the package's own step. `train.py` does the same and more: it stops and
# goes on, evaluates, keeps checkpoints, divides the batch over devices.

# %%
import functools
import math
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig
from moe_jax.data.batches import train_batches
from moe_jax.model.decoder import Decoder, Tokens
from moe_jax.model.machine import this_machine
from moe_jax.model.moe.backends import for_machine
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.plays import find_plays, render_play
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.report.pictures import plot_expert_load, plot_loss_curve
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import MetricsFile
from moe_jax.sharding.mesh import make_mesh, put_batch, use_mesh
from moe_jax.training.flops import count_params
from moe_jax.training.metrics import named_metrics, routing_by_layer, step_metrics
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.state import init_state
from moe_jax.training.step import train_step

folder = tempfile.TemporaryDirectory()
text = render_play(dict(find_plays())["the-comedy-of-errors"].read_text(encoding="utf-8"))
Path(folder.name, "play.txt").write_text(text, encoding="utf-8")
data = prepare_folder(PrepareConfig((f"{folder.name}/play.txt",), out=f"{folder.name}/data", tokenizer="char"))
moe = MoEConfig(num_experts=4, top_k=2, expert_dim=64)
config = Config(
    model=ModelConfig(context_length=64, num_layers=2, embed_dim=64, moe=moe),
    data=DataConfig(batch_size=16),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
)

# %% [markdown]
# What is there to beat? A model that knows nothing of the text has a loss of ln V nats a token. One that knows how
# frequent each character is, and nothing of what came before, has the *unigram entropy*.

# %%
split, V = data.corpora[0].train, data.tokenizer.vocab_size
share_V = np.bincount(split.stream().read(0, split.num_tokens), minlength=V) / split.num_tokens
unigram_entropy = -sum(p * math.log(p) for p in share_V if p > 0)
print(f"ln V {math.log(V):.3f}, unigram entropy {unigram_entropy:.3f} nats a token")
assert unigram_entropy < math.log(V)

# %% [markdown]
# The state holds all that a step changes: parameters and the optimizer's means. Most parameters are experts', of which
# a token uses half here.

# %%
mesh = make_mesh(config.mesh, config.data.batch_size)
num_tokens = config.data.batch_size * config.model.context_length
decoder = Decoder(for_machine(config.model, num_tokens, train=True, machine=this_machine()), V)
optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, num_steps=100))
state = init_state(decoder, optimizer, mesh, seed=0)
total, active = count_params(state.params, moe)
print(f"{total:,} parameters, {active:,} of them active for a token")
assert total - active > total / 3, "more than two thirds are experts'"

# %% [markdown]
# A step is a pure function from state and batch to a new state and what there is to say about it. Its objective is the
# cross-entropy of the next token plus the weighted losses of part 5; the loss it reports is the cross-entropy alone.

# %%
one_step = jax.jit(functools.partial(train_step, config, decoder, optimizer), donate_argnums=0)
run = RunDirectory(Path(folder.name, "run"))
run.path.mkdir()
losses_S, share_NE = [], np.zeros((2, 4))
with (
    use_mesh(mesh),
    train_batches(data, config.data, context_length=64) as batches,
    MetricsFile(run, None) as writer,
):
    for step in range(1, 101):
        state, output = one_step(state, put_batch(next(batches), mesh))
        losses_S.append(float(output.loss))
        load = routing_by_layer(output.routing)
        share_NE += np.array(load["moe/load"]) / 100
        writer.write(step, named_metrics(step_metrics(jax.device_get(output))) | load)
        if step % 20 == 0:
            print(f"step {step:3}: loss {losses_S[-1]:.3f}, unigram entropy {unigram_entropy:.3f}")
assert abs(losses_S[0] - math.log(V)) < 0.1, "at first it knows nothing"
assert np.mean(losses_S[-10:]) < unigram_entropy - 0.5, "then more than how frequent characters are"
assert share_NE.min() > 0.1, "every expert of both layers is in use"

# %% [markdown]
# The two pictures of a run, as `train.py` makes them: its loss, and what share of the rows each expert gets.

# %%
figure, axes_of = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
for axes, file in zip(axes_of, (plot_loss_curve(run), plot_expert_load(run)), strict=True):
    image = axes.imshow(plt.imread(file))
    axes.set_axis_off()
folder.cleanup()

# %% [markdown]
# ## 7. Sampling
#
# The model gives one logit for each token of the vocabulary; a text is drawn from them, one token after the other.
# Three ways to shape the draw, each a function of a row of logits, on one small distribution.

# %%
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.commands.training import train
from moe_jax.config import Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from moe_jax.model.attention import init_caches
from moe_jax.model.decoder import Tokens, forward
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.plays import find_plays, render_play
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import open_run
from moe_jax.sampling.api import load_engine
from moe_jax.sampling.processors import keep_top_k, keep_top_p, scale_by_temperature

logits_V = jnp.log(jnp.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04]))
shaped = {
    "as it is": logits_V,
    "temperature 0.5": scale_by_temperature(logits_V, 0.5),
    "top-k 3": keep_top_k(logits_V, 3),
    "top-p 0.7": keep_top_p(logits_V, 0.7),
}
probs = {name: np.asarray(jax.nn.softmax(values_V)) for name, values_V in shaped.items()}
figure, axes_of = plt.subplots(1, 4, figsize=(10, 2.4), sharey=True, layout="constrained")
for axes, (name, probs_V) in zip(axes_of, probs.items(), strict=True):
    axes.set(title=name, xlabel="token")
    bars = axes.bar(range(len(probs_V)), probs_V)

# %% [markdown]
# Temperature t raises probabilities to the power 1/t: below 1 the likely become likelier. Top-k keeps the k most
# likely tokens, top-p the fewest most likely that reach p together: few where the model is sure, many where not.

# %%
p_V = probs["as it is"]
np.testing.assert_allclose(probs["temperature 0.5"], p_V**2 / np.sum(p_V**2), rtol=1e-5)
np.testing.assert_allclose(probs["top-k 3"], [*(p_V[:3] / np.sum(p_V[:3])), 0, 0, 0], rtol=1e-5)
num_kept = 1 + np.argmax(np.cumsum(p_V) >= 0.7)
assert num_kept == 3 == np.sum(probs["top-p 0.7"] > 0)
assert np.sum(jax.nn.softmax(keep_top_p(logits_V * 5.0, 0.7)) > 0) == 1, "a model that is sure"

# %% [markdown]
# Now a model to draw from: what `train.py` does, a hundred steps on one play.

# %%
folder = tempfile.TemporaryDirectory()
text = render_play(dict(find_plays())["the-comedy-of-errors"].read_text(encoding="utf-8"))
Path(folder.name, "play.txt").write_text(text, encoding="utf-8")
prepare_folder(PrepareConfig((f"{folder.name}/play.txt",), out=f"{folder.name}/data", tokenizer="char"))
moe = MoEConfig(num_experts=4, top_k=2, expert_dim=64)
config = Config(
    model=ModelConfig(context_length=64, num_layers=2, embed_dim=64, moe=moe),
    data=DataConfig(path=f"{folder.name}/data", batch_size=16),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
    train=TrainConfig(num_steps=100, compile_cache=False),
)
run = RunDirectory(Path(folder.name, "run"))
train(config, run.path)
engine, variables = load_engine(open_run(run.path, "newest"))
(sample,) = engine.generate(variables, "DROMIO", config.sample)
print(sample.prompt + sample.text)
assert len(sample.tokens) == config.sample.max_new_tokens or sample.finish_reason == "stop"

# %% [markdown]
# To draw the next token from scratch, the whole text so far would go through the model once more. But earlier tokens
# never see later ones, so their keys and values stay what they were: a *cache* keeps them, and each turn computes one
# token only. Token by token through the cache gives the logits of one full pass.

# %%
decoder = engine.programs.decoder_for(num_tokens=1)
prompt = "ANTIPHOLUS OF SYRACUSE:\nThe"
settings = dataclasses.replace(config.sample, max_new_tokens=30, temperature=0.0)
(greedy,) = engine.generate(variables, prompt, settings)
tokens_L = np.array([*engine.tokenizer.encode(prompt), *greedy.tokens], np.int32)
full_LV = forward(decoder, variables, Tokens(tokens_L[None])).logits_BLV[0]


@jax.jit
def turn(token_BL, position_BL, caches):
    return forward(decoder, variables, Tokens(token_BL, position_BL=position_BL), caches=caches)


caches = init_caches(engine.config, batch_size=1, cache_length=64)
for position, token in enumerate(tokens_L):
    output = turn(token[None, None], jnp.full((1, 1), position), caches)
    caches = output.caches
    np.testing.assert_allclose(output.logits_BLV[0, 0], full_LV[position], rtol=1e-3, atol=1e-3)

# %% [markdown]
# At temperature 0 each token is the most likely after those before it, which one full pass confirms for all at once.

# %%
first = len(tokens_L) - len(greedy.tokens)
assert (np.argmax(full_LV, axis=1)[first - 1 : -1] == tokens_L[first:]).all()
print(prompt + greedy.text)
folder.cleanup()
