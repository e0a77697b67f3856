"""Several threads, or asyncio tasks, use one swapped model at the same time: each has its own mask, recording and replay."""

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from huggingface.models import LAYERS, batch, evidence, fit_on_noise, mixtral
from torch import Tensor, nn

from moe_posterior import record, swap_gates
from moe_posterior.huggingface import swapped_gates
from moe_posterior.replay import replay

WAIT = 60.0  # seconds until a thread that waits for another gives up


def swapped(**options: Any) -> nn.Module:
    model = mixtral(**options)
    swap_gates(model, num_clusters=3, half_life=None, amnesty=None)
    fit_on_noise(dict(swapped_gates(model)))
    return model


def total(model: nn.Module) -> float:
    return sum(evidence(gate) for _, gate in swapped_gates(model))


def elsewhere(work: Callable[[], Any]) -> Any:
    """Run it in a thread of its own, to its end."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(WAIT)


def real(trace: Any) -> list[list[bool]]:
    return [routing.distance.isfinite().tolist() for name, routing in trace.routings if ".0." in name]


def meet(barrier: threading.Barrier) -> None:
    barrier.wait()


def infer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch(seed=9)).logits


def train(model: nn.Module) -> Tensor:
    inputs = batch(seed=9)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("other", [infer, train])
def test_what_another_thread_runs_meanwhile_enters_no_recording(
    other: Callable[[nn.Module], Tensor], checkpointing: bool | None
) -> None:
    counted = []
    for disturbed in (False, True):
        model, inputs = swapped(), batch()
        if checkpointing is not None:
            model.activation_checkpointing_enable({"use_reentrant": checkpointing})
            model.train()
        with record(model) as trace:
            if disturbed:
                elsewhere(lambda: other(model))  # noqa: B023, it ends here
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            if disturbed:
                elsewhere(lambda: other(model))  # noqa: B023
        assert len(trace) == LAYERS
        loss.backward()
        trace.observe_gradients()
        counted.append([gate.posterior.successes.clone() for _, gate in swapped_gates(model)])
    assert float(counted[0][0].sum()) > 0
    assert all(torch.equal(alone, disturbed) for alone, disturbed in zip(*counted, strict=True))


def test_other_asyncio_tasks_enter_no_recording_and_a_copied_context_does() -> None:
    model = swapped()

    async def main() -> int:
        inside, done = asyncio.Event(), asyncio.Event()

        async def bystander() -> None:
            await inside.wait()
            infer(model)
            done.set()

        task = asyncio.create_task(bystander())
        with record(model) as trace:
            inside.set()
            await done.wait()
            assert len(trace) == 0
            await asyncio.to_thread(infer, model)
            assert len(trace) == LAYERS
            elsewhere(lambda: contextvars.copy_context().run(infer, model))
            assert len(trace) == LAYERS  # the copy was made in the other thread
            context = contextvars.copy_context()
            elsewhere(lambda: context.run(infer, model))
        await task
        return len(trace)

    assert asyncio.run(main()) == 2 * LAYERS


def test_two_threads_record_one_model_each_for_itself() -> None:
    model, barrier = swapped(), threading.Barrier(2, timeout=WAIT)

    def run(seed: int) -> list[Tensor]:
        with record(model) as trace, torch.no_grad():
            model(**batch(seed=seed))
        return [routing.expert_indices for _, routing in trace.routings]

    alone = [run(0), run(1)]
    model.model.layers[0].register_forward_pre_hook(lambda *_: meet(barrier))
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, [0, 1]))
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) == LAYERS
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def test_two_threads_with_different_masks_each_have_their_own_padding() -> None:
    model, barrier = swapped(), threading.Barrier(2, timeout=WAIT)
    model.model.layers[0].register_forward_pre_hook(lambda *_: meet(barrier))

    def run(padded: int) -> list[list[bool]]:
        with record(model) as trace, torch.no_grad():
            model(**batch(padded=padded))
        return real(trace)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, [0, 6]))
    assert found == [[[True] * 30], [[False] * 6 + [True] * 24]]


def fails(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    handle = model.model.layers[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    handle.remove()


def generates(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    "before", [lambda model, inputs: model(**inputs), fails, generates], ids=["call", "fail", "generate"]
)
def test_a_mask_is_forgotten_when_its_call_is_over(before: Callable[..., Any]) -> None:
    model, inputs = swapped(), batch(padded=6)
    before(model, inputs)
    with record(model) as trace, torch.no_grad():
        model.model(inputs["input_ids"])
    assert real(trace) == [[True] * 30]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_calls_with_different_masks_keep_their_own_padding(reentrant: bool) -> None:
    model = swapped()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with record(model) as trace:
        loss = sum(model(**batch(seed=n, padded=n), labels=batch(seed=n)["input_ids"]).loss for n in (3, 5))
    model(**batch())  # another call, without padding, before the backward pass
    loss.backward()
    assert real(trace) == [[False] * n + [True] * (30 - n) for n in (3, 5)]
    trace.observe_gradients()
    assert total(model) > 0


@pytest.mark.parametrize("weights", ["recorded", "recomputed"])
def test_a_replay_forces_nothing_on_another_thread(weights: Any) -> None:
    model, entered, done = swapped(), threading.Event(), threading.Event()
    own = infer(model)
    with record(model) as trace, torch.no_grad():
        before = model(**batch()).logits

    def while_inside(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            entered.set()
            done.wait(WAIT)

    model.model.layers[-1].register_forward_pre_hook(while_inside)

    def other() -> Tensor:
        entered.wait(WAIT)
        found = infer(model)
        done.set()
        return found

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(other)
        with replay(model, trace, weights=weights), torch.no_grad():
            after = model(**batch()).logits
        assert torch.equal(future.result(WAIT), own)
    assert torch.equal(after, before)


class Pause(torch.autograd.Function):
    """An identity whose first backward lets another thread run."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, pause: Callable[[], None]) -> Tensor:
        ctx.pause = pause
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.pause()
        return gradients[0], None


def test_separating_an_auxiliary_loss_leaves_another_threads_gradients_alone() -> None:
    def step(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        inputs = batch()
        with record(model) as trace:
            loss = model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss
        loss.backward()
        outcomes = [outcome for _, _, outcome in trace.gradient_outcomes()]
        return [parameter.grad for parameter in model.parameters()], outcomes

    paused, other = swapped(router_aux_loss_coef=5.0), swapped(router_aux_loss_coef=5.0)
    gradients, outcomes = step(copy.deepcopy(other))
    go, done, found = threading.Event(), threading.Event(), []

    def work() -> None:
        go.wait(WAIT)
        found.append(step(other))
        done.set()

    def pause() -> None:
        go.set()
        done.wait(WAIT)

    paused.model.layers[0].register_forward_hook(lambda _, __, output: Pause.apply(output, pause))
    thread = threading.Thread(target=work)
    thread.start()
    mine = step(paused)
    thread.join(WAIT)
    for got in (found[0], mine):
        assert all(torch.equal(one, right) for one, right in zip(got[0], gradients, strict=True))
        assert all(
            torch.equal(one.nan_to_num(9), right.nan_to_num(9)) for one, right in zip(got[1], outcomes, strict=True)
        )
