import copy
import hashlib
import inspect
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from huggingface.models import batch, condemn, mixtral
from model_survey.tiny import tiny_batch, tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MixtralForCausalLM, MixtralModel

from moe_posterior import InvalidArgumentError, record, restore_gates, swap_gates
from moe_posterior.errors import DamagedFileError, MissingDataError
from moe_posterior.files.tensorfile import load_tensors, save_tensors
from moe_posterior.huggingface import (
    copy_belief,
    load_belief,
    load_swapped,
    loading,
    report_of,
    save_belief,
    swapped_gates,
)
from moe_posterior.huggingface.loading import _aligned
from moe_posterior.huggingface.saving import FILE, KIND, MARKER


def believing(model: nn.Module, **options: object) -> nn.Module:
    """The model, swapped, fitted, and with some evidence that matters."""
    swap_gates(model, num_clusters=4, **options).fit([batch(seed=seed) for seed in range(3)])
    gates = dict(swapped_gates(model))
    with record(model) as trace:
        model(**batch())
    trace.observe(torch.rand(3, 10, generator=torch.Generator().manual_seed(0)))
    if options.get("mode") != "replace":
        condemn(gates["model.layers.0.mlp.gate"], expert=1)
    return model


def belief(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor for name, gate in swapped_gates(model) for key, tensor in gate.state_dict().items()}


def same_belief(one: nn.Module, other: nn.Module) -> bool:
    left, right = belief(one), belief(other)
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What transformers warned of while loading."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("transformers.modeling_utils"), Keep(logging.WARNING)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("mode", ["prior", "replace"])
def test_a_saved_and_loaded_model_has_the_same_belief_and_outputs_bit_for_bit(
    mode: str, tmp_path: Path, warned: list[str]
) -> None:
    model = believing(mixtral(), mode=mode, half_life=50.0)
    model.save_pretrained(tmp_path)
    loaded = load_swapped(tmp_path)
    assert type(loaded) is MixtralForCausalLM
    assert not warned
    assert same_belief(loaded, model)
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    gate = dict(swapped_gates(loaded))["model.layers.0.mlp.gate"]
    assert gate.posterior.half_life == 50.0
    assert MARKER not in loaded.state_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_a_plain_load_gives_the_stock_model_and_warns_of_the_belief(tmp_path: Path, warned: list[str]) -> None:
    model = believing(mixtral())
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(MARKER in message and "UNEXPECTED" in message for message in warned)
    assert not list(swapped_gates(plain))
    restore_gates(model)
    assert torch.equal(plain(**batch()).logits, model(**batch()).logits)


def test_the_weights_of_the_model_hold_no_belief_and_are_named_as_ever(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "stock")
    believing(mixtral()).save_pretrained(tmp_path / "swapped")
    stock, swapped = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "swapped"))
    assert swapped.keys() - stock.keys() == {MARKER}
    assert all(torch.equal(swapped[key], stock[key]) for key in stock)
    digest = hashlib.sha256((tmp_path / "swapped" / FILE).read_bytes()).digest()
    assert bytes(swapped[MARKER].tolist()) == digest
    configs = [(tmp_path / name / "config.json").read_text() for name in ("stock", "swapped")]
    assert configs[0] == configs[1]


def test_shards_and_low_precision_leave_the_belief_alone(tmp_path: Path) -> None:
    model = believing(mixtral())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = load_swapped(tmp_path, AutoModelForCausalLM, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert same_belief(loaded, model)


def test_a_state_dict_carries_the_belief_and_fits_no_stock_model() -> None:
    model = believing(mixtral())
    state = copy.deepcopy(model.state_dict())
    other = mixtral(seed=1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(state)
    swap_gates(other, num_clusters=4)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(mixtral().state_dict())
    other.load_state_dict(state)
    assert same_belief(other, model)
    assert dict(swapped_gates(other))["model.layers.0.mlp.gate"].biased
    assert torch.equal(other(**batch()).logits, model(**batch()).logits)


def test_a_copied_model_saves_its_own_belief(tmp_path: Path) -> None:
    model = believing(mixtral())
    other = copy.deepcopy(model)
    condemn(dict(swapped_gates(other))["model.layers.1.mlp.gate"], expert=0)
    other.save_pretrained(tmp_path)
    loaded = load_swapped(tmp_path)
    assert same_belief(loaded, other)
    assert not same_belief(loaded, model)


def test_a_given_state_dict_is_saved_without_its_belief(tmp_path: Path) -> None:
    model = believing(mixtral())
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert same_belief(load_swapped(tmp_path), model)


def test_a_belief_that_is_missing_damaged_or_anothers_is_refused(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    with pytest.raises(MissingDataError, match="there is no such file"):
        load_swapped(tmp_path)
    model = believing(mixtral())
    model.save_pretrained(tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(InvalidArgumentError, match="another one, or damaged"):
        load_swapped(tmp_path)
    content[-1] ^= 1
    (tmp_path / FILE).write_bytes(content)
    load_swapped(tmp_path)
    restore_gates(model)
    model.save_pretrained(tmp_path)  # an unswapped model saved over a swapped one
    with pytest.raises(InvalidArgumentError, match="another one, or damaged"):
        load_swapped(tmp_path)
    assert "moe_posterior" not in model.config.to_dict()


def test_a_belief_of_other_layers_is_refused_and_leaves_the_model_unswapped(tmp_path: Path) -> None:
    save_belief(believing(mixtral()), tmp_path)
    other = tiny_model("qwen3_moe")
    with pytest.raises(InvalidArgumentError, match=r"belief must fit router 'model.layers.0.mlp.gate'"):
        load_belief(other, tmp_path)
    assert not list(swapped_gates(other))
    other(**tiny_batch(other))
    model = mixtral()
    report = load_belief(model, tmp_path)
    assert len(report.swapped) == 2
    with pytest.raises(InvalidArgumentError, match="holds no swapped router"):
        save_belief(mixtral(), tmp_path)


def test_pushing_without_the_belief_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="then upload the folder"):
        believing(mixtral()).save_pretrained(tmp_path, push_to_hub=True)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    believing(mixtral()).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / FILE).exists()


def test_restoring_gives_the_model_its_own_save_pretrained_back(tmp_path: Path) -> None:
    model = believing(mixtral())
    restore_gates(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("swap_first", [True, False])
def test_a_model_with_lora_adapters_works_and_keeps_its_belief(swap_first: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    if swap_first:
        base = mixtral()
        swap_gates(base, num_clusters=4)
        model = peft.get_peft_model(base, lora)
    else:
        model = peft.get_peft_model(mixtral(), lora)
        swap_gates(model, num_clusters=4)
    gates = dict(swapped_gates(model))
    for gate in gates.values():
        gate.fit(torch.randn(50, gate.hidden_size, generator=torch.Generator().manual_seed(0)))
    with record(model) as trace:
        loss = model(**batch(), labels=batch()["input_ids"]).loss
    loss.backward()
    trace.observe_gradients()
    assert all(float(gate.posterior.successes.sum()) > 0 for gate in gates.values())
    condemn(next(iter(gates.values())), expert=1)
    logits = model(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(mixtral(), tmp_path).eval()
    assert not torch.equal(loaded(**batch()).logits, logits)
    load_belief(loaded, tmp_path)
    assert same_belief(loaded, model)
    assert torch.equal(loaded(**batch()).logits, logits)


def test_a_torn_or_foreign_belief_file_is_refused_as_such_also_without_a_config(tmp_path: Path) -> None:
    save_belief(believing(mixtral()), tmp_path)
    good = (tmp_path / FILE).read_bytes()
    flipped = good[:-3] + bytes([good[-3] ^ 1]) + good[-2:]
    foreign = safetensors.torch.save({"weight": torch.zeros(2)})
    for content in (b"", good[:5], good[:100], good[: len(good) // 2], flipped, b"hello world" * 50, foreign):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(DamagedFileError):
            load_belief(mixtral(), tmp_path)
    (tmp_path / FILE).write_bytes(good)
    (tmp_path / "config.json").write_text('{"torn": ')
    with pytest.raises(DamagedFileError, match=r"config\.json cannot be read"):
        load_belief(mixtral(), tmp_path)


def test_a_loaded_model_that_is_restored_and_saved_again_leaves_no_belief_behind(tmp_path: Path) -> None:
    believing(mixtral()).save_pretrained(tmp_path)
    model = load_swapped(tmp_path)
    assert not hasattr(model.config, "moe_posterior")
    restore_gates(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="another one, or damaged"):
        load_swapped(tmp_path)


def test_a_knob_that_could_not_be_saved_is_refused_before_anything_is_swapped() -> None:
    model = mixtral()
    with pytest.raises(InvalidArgumentError, match="knobs must be plain numbers"):
        swap_gates(model, num_clusters=4, penalty=np.float32(3.0))
    assert not list(swapped_gates(model))


def test_knobs_that_were_configured_later_are_kept_layer_by_layer(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    swap_gates(model, 4, mode="replace", risk_aversion=2.0)
    gates = [gate for _, gate in swapped_gates(model)]
    gates[0].configure(risk_aversion=3.0, score="mean")
    model.save_pretrained(tmp_path)
    found = [gate for _, gate in swapped_gates(load_swapped(tmp_path))]
    assert [(gate.score, gate.risk_aversion) for gate in found[:2]] == [("mean", 3.0), ("lcb", 2.0)]


def test_a_model_around_the_one_that_was_swapped_saves_its_belief(tmp_path: Path) -> None:
    model = mixtral()
    swap_gates(model.model, num_clusters=4).fit([batch()])
    condemn(dict(swapped_gates(model))["model.layers.0.mlp.gate"], expert=1)
    model.save_pretrained(tmp_path)
    assert not any("posterior_gate" in name for name in load_file(tmp_path / "model.safetensors"))
    loaded = load_swapped(tmp_path)
    assert same_belief(loaded, model)
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_a_peft_wrapper_that_is_imported_after_the_swap_saves_the_belief(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    kinds = (peft.PeftModel, peft.PeftMixedModel)
    for kind in kinds:  # as they are right after their import
        monkeypatch.setattr(kind, "save_pretrained", inspect.unwrap(kind.save_pretrained))
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("peft")}
    base = believing(mixtral())
    sys.modules.update(modules)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model(**batch())
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).is_file()


@pytest.mark.parametrize("saved", ["whole", "base"])
def test_a_belief_crosses_the_prefix_of_the_base_model(saved: str, tmp_path: Path) -> None:
    model = believing(mixtral())
    (model if saved == "whole" else model.model).save_pretrained(tmp_path)
    kind, auto = (MixtralModel, AutoModel) if saved == "whole" else (MixtralForCausalLM, AutoModelForCausalLM)
    with pytest.warns(UserWarning, match="does not fit"):  # there is a head too many, or one too few
        loaded = load_swapped(tmp_path, auto)
    assert type(loaded) is kind
    pairs = list(zip(swapped_gates(loaded), swapped_gates(model), strict=True))
    assert all(torch.equal(one.posterior.failures, other.posterior.failures) for (_, one), (_, other) in pairs)
    inner = loaded if saved == "whole" else loaded.model
    assert torch.equal(inner(**batch()).last_hidden_state, model.model(**batch()).last_hidden_state)


@pytest.mark.parametrize(
    "names", [("encoder.0.gate", "decoder.0.gate"), ("xmodel.0.gate", "model.0.gate"), ("0.gate", "1.gate")]
)
def test_routers_of_other_places_are_not_taken_for_the_saved_ones(names: tuple[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="belief must be for this model's routers"):
        list(_aligned([names[0]], [names[1]]))


def test_a_plain_load_saved_again_names_no_belief(tmp_path: Path) -> None:
    believing(mixtral()).save_pretrained(tmp_path / "swapped")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped")
    plain.save_pretrained(tmp_path / "again")
    assert "moe_posterior" not in (tmp_path / "again" / "config.json").read_text()
    assert MARKER not in load_file(tmp_path / "again" / "model.safetensors")


def test_a_swapped_model_takes_a_saved_belief_or_stays_as_it_is(tmp_path: Path) -> None:
    model = believing(mixtral())
    save_belief(model, tmp_path)
    other = mixtral()
    report = swap_gates(other, num_clusters=4)
    assert str(load_belief(other, tmp_path)) == str(report)
    assert same_belief(other, model)
    third = mixtral()
    swap_gates(third, num_clusters=5)
    with pytest.raises(InvalidArgumentError, match="model must be swapped as the saved one was"):
        load_belief(third, tmp_path)
    assert all(gate.num_clusters == 5 for _, gate in swapped_gates(third))
    tensors, header = load_tensors(tmp_path / FILE, KIND)
    tensors["model.layers.1.mlp.gate.posterior.failures"][0] = torch.nan
    save_tensors(tmp_path / FILE, tensors, header)
    condemn(dict(swapped_gates(other))["model.layers.0.mlp.gate"], expert=2)
    before = copy.deepcopy(belief(other))
    with pytest.raises(InvalidArgumentError, match="failures must be"):
        load_belief(other, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in belief(other).items())


def test_a_reference_model_gets_a_copy_of_the_belief() -> None:
    model, reference = believing(mixtral()), mixtral()
    assert str(copy_belief(model, reference)) == str(report_of(model))
    assert torch.equal(reference(**batch()).logits, model(**batch()).logits)
    condemn(dict(swapped_gates(model))["model.layers.1.mlp.gate"], expert=0)
    assert not same_belief(reference, model)


def test_the_report_of_a_loaded_model_is_that_of_its_swap(tmp_path: Path) -> None:
    model = mixtral()
    report = swap_gates(model, num_clusters=4, mode="replace")
    model.save_pretrained(tmp_path)
    found = report_of(load_swapped(tmp_path))
    assert (found.layers, found.mode) == (report.layers, "replace")
    with pytest.raises(InvalidArgumentError, match="holds no swapped router"):
        report_of(mixtral())


def test_parts_that_were_swapped_in_different_ways_are_not_saved_as_one(tmp_path: Path) -> None:
    model = nn.ModuleDict({"policy": mixtral(), "critic": mixtral()})
    swap_gates(model["policy"], num_clusters=4)
    swap_gates(model["critic"], num_clusters=5)
    with pytest.raises(InvalidArgumentError, match="save the parts separately"):
        save_belief(model, tmp_path)


def test_a_model_unpickled_in_a_process_that_swapped_nothing_saves_its_belief(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pickle.dumps(believing(mixtral()))
    kind = transformers.PreTrainedModel
    monkeypatch.setattr(kind, "save_pretrained", inspect.unwrap(kind.save_pretrained))
    model = pickle.loads(content)
    model.save_pretrained(tmp_path)
    assert same_belief(load_swapped(tmp_path), model)


@pytest.mark.parametrize("version", ["same", "other"])
def test_a_loaded_model_compiles_whole_at_once_where_the_same_transformers_saved_it(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixtral()
    swap_gates(model, num_clusters=4).fit([batch(seed=seed) for seed in range(3)])
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    if version == "other":
        monkeypatch.setattr(loading, "transformers_version", lambda: "0.0")
    loaded = load_swapped(tmp_path)
    torch._dynamo.reset()
    whole = torch.compile(loaded, backend="eager", fullgraph=True)
    if version == "same":
        assert torch.equal(whole(**batch()).logits, expected)
    else:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            whole(**batch())
        assert torch.equal(loaded(**batch()).logits, expected)
