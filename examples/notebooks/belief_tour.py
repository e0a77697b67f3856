# %% [markdown]
# # A tour of the belief
# What the gate knows, how it decides, and what changes its mind. Run the cells one by one (VS Code, PyCharm and Jupytext read the
# `# %%` marks), or all at once: `python examples/notebooks/belief_tour.py`, a few seconds.

# %%
import torch

from moe_posterior import PosteriorGate

torch.set_printoptions(precision=2, sci_mode=False)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# Inputs fall into clusters. Here are three blobs in the plane, and four experts. Expert 0 is good everywhere, 1 and 2 are specialists
# of the first and second blob, 3 is poor everywhere.

# %%
centres = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
competence = torch.tensor([[0.8, 0.95, 0.3, 0.2], [0.8, 0.3, 0.95, 0.2], [0.8, 0.3, 0.3, 0.2]])


def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:  # -> (N, 2), (N,)
    blobs = torch.randint(3, (count,), generator=generator)
    return centres[blobs] + torch.randn(count, 2, generator=generator), blobs


hidden, blobs = draw(600)
gate = PosteriorGate(hidden_size=2, num_experts=4, num_clusters=3, top_k=1)
gate.fit(hidden)
print(gate)

# %% [markdown]
# Before any outcome every cell is Beta(1, 1): mean ½, and all scores are equal. Ties are broken by the cluster's number, so that the
# clusters start with different experts.

# %%
print(gate.posterior.mean())
print("expert of each cluster:", gate.topk_indices.flatten().tolist())

# %% [markdown]
# Outcomes arrive: one for the expert that was chosen (`(N, 1)` here, because `top_k=1`), or one for every expert (`(N, E)`). `NaN`
# means that the outcome is unknown.

# %%
outcome = (torch.rand(600, 4, generator=generator) < competence[blobs]).double()
outcome[torch.rand(600, 4, generator=generator) < 0.5] = torch.nan
gate.observe(gate(hidden), outcome)
print(gate.posterior.mean())
print("lower bound, mean - 1 std:\n", gate.posterior.lcb(risk_aversion=1.0))
print("expert of each cluster:", gate.topk_indices.flatten().tolist())

# %% [markdown]
# A routing says why: the cluster, the score, the distance to the cluster's centre. Below a threshold it abstains.

# %%
routing = gate(torch.tensor([[0.2, 0.1], [3.0, 3.0]]))
print(routing)
print("abstain below 0.9:", routing.abstain(0.9).tolist())

# %% [markdown]
# An expert breaks. Without forgetting, its 200 good outcomes must be outweighed; with a half-life, or with the surprise detector, the
# gate changes its mind sooner.

# %%
for options in ({}, {"half_life": 50}, {"surprise": 6.0}):
    other = PosteriorGate(hidden_size=2, num_experts=4, num_clusters=3, top_k=1, **options)
    other.fit(hidden, generator=torch.Generator().manual_seed(0))
    other.observe(other(hidden), (torch.rand(600, 4, generator=generator) < competence[blobs]).double())
    cluster = other(torch.zeros(1, 2)).cluster_ids
    asked = 0
    while asked < 500 and other.topk_indices[cluster].item() == 1:  # expert 1, best there so far, now always fails
        other.observe(other(torch.zeros(1, 2)), torch.zeros(1, 1))
        asked += 1
    print(f"{options or 'defaults'}: expert 1 left after {asked} failures")

# %% [markdown]
# The belief is two tables of counts and a prior. Counts add up across replicas, are saved in the `state_dict` in float64, and
# survive every cast of the model.

# %%
replica = PosteriorGate(hidden_size=2, num_experts=4, num_clusters=3, top_k=1)
replica.load_state_dict(gate.state_dict())
replica.posterior.merge(gate.posterior)
print("observations:", float(gate.posterior.successes.sum()), "merged:", float(replica.posterior.successes.sum()))
print("dtype after .half():", replica.half().posterior.successes.dtype)
