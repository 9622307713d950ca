"""The Trainer's callbacks over ranks: the bias that balances experts, and the load in the log, are those of one process."""

from __future__ import annotations

import os

import pytest
import torch

from tests.support.spawn import run


def balanced(rank, world, folder):
    """Four steps of two micro-batches; (biases by name, what was logged)."""
    from transformers import TrainingArguments

    import moefx
    from moefx.trainer import RouterBias, Trainer
    from tests.support.families import batch, build

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    model = build("deepseek_v3")
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias[3] = 0.3  # everybody goes to expert 3
    options = {"compile": False, "strict": True}
    model = moefx.parallelize(model, ep_size=world, **options) if world > 1 else moefx.optimize(model, **options)
    rows = [{k: v[0] for k, v in batch(1, 32, seed=s).items()} for s in range(32)]
    arguments = TrainingArguments(
        f"{folder}/{world}",
        max_steps=4,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[RouterBias(5e-2)])
    trainer.train()
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    return biases, [{k: v for k, v in h.items() if k.startswith("router/")} for h in trainer.state.log_history if "loss" in h]


def test_one_process_and_two_ranks(tmp_path):
    ((one, logged),) = run(balanced, 1, str(tmp_path), timeout=200)
    ranks = run(balanced, 2, str(tmp_path), timeout=200)
    layers = [f"/model.layers.{i}.mlp.experts" for i in (1, 2)]
    names = {f"router/{name}{layer}" for name in ("max_load", "entropy") for layer in ("", *layers)} | {"router/dropped"}
    assert len(one) == 2 and len(logged) == 2 and set(logged[0]) == names
    for log in logged:
        assert log["router/max_load"] == max(log[f"router/max_load{layer}"] for layer in layers)
        assert log["router/entropy"] == pytest.approx(sum(log[f"router/entropy{layer}"] for layer in layers) / 2, abs=1e-4)
    for biases, log in ranks:
        assert all(torch.equal(b, one[n]) for n, b in biases.items())
        assert log == logged
    for bias in one.values():
        assert abs(float(bias[3]) - 0.1) < 1e-6  # down in each of the four steps
    assert logged[1]["router/max_load"] < logged[0]["router/max_load"]


def adapters(rank, world, folder):
    """LoRA under gradient checkpointing: a run of four steps, and one that stops after two and goes on from other weights on another
    mesh; then what the Trainer takes for the best model. (losses, losses), (best, evaluated again), the error of bad numbers."""
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback, TrainingArguments

    import moefx
    from moefx.trainer import Trainer
    from tests.support.families import batch, build

    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {k: str(v) for k, v in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        init_lora_weights=False,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    rows = [{k: v[0] for k, v in batch(1, 16, seed=s).items()} for s in range(40)]

    def trainer(out, model, callbacks=(), **options):
        arguments = TrainingArguments(
            f"{folder}/{out}",
            max_steps=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            gradient_checkpointing=True,
            **{"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, **options},
        )
        return Trainer(
            model,
            arguments,
            train_dataset=rows[:32],
            eval_dataset=rows[32:],
            callbacks=list(callbacks),
            log_router_load="model",
        )

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    def spread(seed=1, ep=world, **options):
        torch.manual_seed(seed)  # of the adapter's weights
        return moefx.parallelize(get_peft_model(build("qwen3_moe"), lora), ep_size=ep, compile=False, **options)

    runs = (
        trainer("whole", spread(), save_strategy="no"),
        trainer("stopped", spread(), [Stop()]),
        trainer("stopped", spread(7, ep=1)),
    )
    for i, run_ in enumerate(runs):
        run_.train(resume_from_checkpoint=i == 2)
    losses = [[h["loss"] for h in runs[i].state.log_history if "loss" in h] for i in (0, 2)]

    model = moefx.parallelize(build("qwen3_moe"), ep_size=world, compile=False)
    best = trainer(
        "best",
        model,
        learning_rate=0.5,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        save_total_limit=1,
    )
    before = best.evaluate()["eval_loss"]  # must leave nothing gathered to the optimizer
    best.train()
    found = [before, *(h["eval_loss"] for h in best.state.log_history[1:] if "eval_loss" in h), best.evaluate()["eval_loss"]]

    model = moefx.parallelize(build("qwen3_moe"), ep_size=world, compile=False, check_numerics=True)
    with pytest.raises(moefx.MoefxError) as error:
        trainer("bad", model, learning_rate=1e30, max_grad_norm=0, save_strategy="no").train()
    return losses, found, str(error.value)


def test_resume_with_an_adapter_and_the_best_model(tmp_path):
    for (whole, resumed), (first, *evaluated, again), error in run(adapters, 2, str(tmp_path), timeout=300):
        assert len(whole) == 4 and whole == pytest.approx(resumed, rel=1e-6)  # at another ep_size: to rounding
        assert len(evaluated) == 4 and again == max(evaluated) > evaluated[-1] + 0.1 and abs(first - evaluated[0]) > 0.1
        assert (
            error.startswith("step 2 (forward 3) on rank ") and "of the routing logits of model.layers.0.mlp are NaN" in error
        )


def twice(rank, world):
    """Two runs of three steps under PyTorch's switch, over ep and FSDP; what differs in a bit."""
    import moefx
    from tests.support.families import batch, build

    torch.use_deterministic_algorithms(True)
    states = []
    for _ in range(2):
        model = moefx.parallelize(build("qwen3_moe"), ep_size=2, compile=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            model(**batch(2, 17 + rank, seed=10 * step + rank)).loss.backward()
            moefx.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        states.append({n: p.detach().to_local().clone() for n, p in model.named_parameters()})
    return [n for n, t in states[0].items() if not torch.equal(t, states[1][n])]


def test_two_runs_are_bitwise_equal():
    assert run(twice, 4, timeout=300) == [[]] * 4
