"""Route queries between agents that fail in different ways, learning from one outcome per query.

Five classifiers play the agents: each was trained on a part of the handwritten digits, so each is good at some and bad at others, and
nobody tells the router which. It sees an embedding of the query, picks an agent, and learns whether that agent was right. Half-way
through, the agent it relies on most breaks down.

    pip install 'moe-posterior[train]'        # for scikit-learn
    python examples/route_between_agents.py   # a few seconds
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from moe_posterior import PosteriorRouter

KNOWN = [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7), (6, 7, 8, 9), (8, 9, 0, 1)]  # the digits each agent was trained on


def main() -> None:
    rng = np.random.default_rng(0)
    images, digits = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    images, digits = images[order] / 16, digits[order]
    embed = PCA(16, random_state=0).fit(images[:600])  # any encoder works if it maps similar queries to nearby points

    agents = []
    for known in KNOWN:
        rows = np.isin(digits[:600], known)
        agents.append(LogisticRegression(max_iter=500).fit(images[:600][rows], digits[:600][rows]))

    router = PosteriorRouter(num_experts=len(agents), hidden_size=16, num_clusters=16)
    router.fit(embed.transform(images[:600]))

    stream = rng.integers(600, len(images), size=3000)
    right, broken = [], None
    for step, row in enumerate(stream):
        if step == 1500:
            broken = int(np.bincount(chosen, minlength=len(agents)).argmax())  # noqa: F821
            print(f"\nagent {broken} breaks down: from now on it answers at random")
        if step % 1500 == 0:
            chosen: list[int] = []
        query = images[row : row + 1]
        decision = router.route(embed.transform(query)[0])
        answer = rng.integers(10) if decision.expert == broken else agents[decision.expert].predict(query)[0]
        outcome = float(answer == digits[row])
        router.resolve(decision.id, outcome)  # may come much later, in any order, from any thread
        chosen.append(decision.expert)
        right.append(outcome)
        if step % 250 == 249:
            print(f"queries {step - 249:4}-{step}: right {np.mean(right[-250:]):.0%}", end="")
            print(
                f", agent {broken} asked {np.mean(np.array(chosen[-250:]) == broken):.0%} of the time"
                if broken is not None
                else ""
            )

    single = [np.mean(agent.predict(images[stream]) == digits[stream]) for agent in agents]
    print(f"\nbest single agent {max(single):.0%}, an agent at random {np.mean(single):.0%}")
    print(f"last decision: {router.route(embed.transform(images[:1])[0])}")


if __name__ == "__main__":
    main()
