"""The trainer's losses and gradients against plain ones, and what must not change them."""

import copy

import pytest
import torch
from helpers import original, random_mla
from torch import nn

from mha2mla_vlm import ConversionConfig, convert, evaluate
from mha2mla_vlm.data.records import IGNORE_INDEX, Record, encode_with_labels
from mha2mla_vlm.evaluation.answers import answer_log_probs, answers_right, predicted
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.training.config import FinetuneConfig
from mha2mla_vlm.training.distillation import attention_outputs, share_frozen
from mha2mla_vlm.training.freezing import set_trained
from mha2mla_vlm.training.records import Chats
from mha2mla_vlm.training.run import make_trainer, prepare
from mha2mla_vlm.zoo.chats import sample_chats

TEXT_ONLY = Record(messages=[{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "7"}])


def records(name, count=6):
    chats = sample_chats(name, split="train", samples=count, seed=4)
    return [Record(messages=chat.messages, images=chat.images) for chat in chats]


def trainer_of(family, tmp_path, chats=None, model=None, teacher=None, **config):
    """A trainer of a random converted model with its original as teacher, in float32."""
    own, processor = original(family)
    teacher = own if teacher is None else teacher
    model = random_mla(family)[0] if model is None else model
    values = {"bf16": False, "batch_size": 3, "gradient_accumulation": 1, "max_steps": 2}
    recipe = FinetuneConfig(**values | {"training_arguments": {"report_to": []}} | config)
    chats = chats or records(family)
    chats = Chats(chats, range(len(chats)))
    return make_trainer(prepare(model, recipe), processor, chats, chats, recipe, tmp_path, teacher)


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


def step(trainer):
    """One training step, as the trainer itself takes it; returns the loss."""
    batch = batch_of(trainer)
    trainer.state.max_steps = 2
    count = (batch["labels"] != IGNORE_INDEX).sum()
    return float(trainer.training_step(trainer.model, dict(batch), num_items_in_batch=count))


def gradients(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_labels_alone_are_the_models_own_loss(family, tmp_path):
    trainer = trainer_of(family, tmp_path, distillation=0.0)
    batch = batch_of(trainer)
    with torch.no_grad():
        own = trainer.model(**batch, use_cache=False).loss
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), own)


def test_distillation_is_the_divergence_on_answers(family, tmp_path):
    """KL of whole logits at the places of answers, and shares of it and of the labels' loss."""
    trainer = trainer_of(family, tmp_path, distillation=0.25, attention_loss=0.0)
    batch = batch_of(trainer)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    is_answer = batch["labels"][:, 1:] != IGNORE_INDEX
    with torch.no_grad():
        found = trainer.model(**inputs, use_cache=False).logits[:, :-1][is_answer].log_softmax(-1)
        wanted = trainer.teacher(**inputs, use_cache=False).logits[:, :-1][is_answer].log_softmax(-1)
        kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
        labels = nn.functional.nll_loss(found, batch["labels"][:, 1:][is_answer])
        loss = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(loss, 0.25 * kl + 0.75 * labels)
    assert kl > 0.1


def test_attention_outputs_are_part_of_distillation(family, tmp_path):
    """Squared error over squared norm, of all tokens but padding, mean over layers."""
    losses = []
    for weight in (0.0, 2.0):
        trainer = trainer_of(family, tmp_path, distillation=0.5, attention_loss=weight)
        batch = batch_of(trainer)
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, dict(batch)))
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with (
        torch.no_grad(),
        attention_outputs(trainer.model) as found,
        attention_outputs(trainer.teacher) as wanted,
    ):
        trainer.model(**inputs, use_cache=False)
        trainer.teacher(**inputs, use_cache=False)
    real = batch["attention_mask"].bool()
    errors = [
        (found[i][real] - wanted[i][real]).norm() ** 2 / wanted[i][real].norm() ** 2 for i in sorted(wanted)
    ]
    assert len(errors) == len(decoder_layers(trainer.model))
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * 2.0 * torch.stack(errors).mean())


def test_a_teacher_that_sees_otherwise_is_asked_itself(tmp_path):
    """Embeddings are taken from the student only where they are the teacher's own."""
    trainer = trainer_of("qwen2_5_vl", tmp_path, attention_loss=0.0)
    teacher, _ = original("qwen2_5_vl")
    torch.manual_seed(0)
    nn.init.normal_(teacher.get_input_embeddings().weight)
    nn.init.normal_(teacher.lm_head.weight, std=0.1)
    batch = batch_of(trainer)
    own = trainer.compute_loss(trainer.model, dict(batch))
    other = trainer_of("qwen2_5_vl", tmp_path, teacher=teacher, attention_loss=0.0)
    assert abs(float(other.compute_loss(other.model, dict(batch)) - own)) > 0.01
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        is_answer = batch["labels"][:, 1:] != IGNORE_INDEX
        found, wanted = (
            model(**inputs, use_cache=False).logits[:, :-1][is_answer].log_softmax(-1)
            for model in (other.model, teacher)
        )
        kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
        torch.testing.assert_close(other.compute_loss(other.model, dict(batch)), kl)


def test_measures_are_those_of_evaluate(family, tmp_path):
    """Teacher-forced marks, cross-entropy and KL of the trainer against `evaluate` and its parts."""
    model, processor = random_mla(family)
    trainer = trainer_of(family, tmp_path, model=model)
    measured = trainer.evaluate()
    teacher, _ = original(family)
    expected = evaluate(model.eval(), processor, records(family), baseline=teacher)
    assert measured["eval_cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-4)
    assert measured["eval_kl"] == pytest.approx(expected["kl"], rel=1e-3)
    marks = []
    for record in records(family):
        batch = encode_with_labels(processor, [record], model.visual_token_ids)
        right = answers_right(answer_log_probs(teacher, batch).argmax(-1), batch)
        marks.append((batch, right))
    batch = batch_of(trainer)
    sums = trainer.prediction_step(teacher, batch, False)[1]
    assert [int(row[3]) for row in sums] == [len(right) for _, right in marks[:3]]
    assert [int(row[4]) for row in sums] == [sum(right) for _, right in marks[:3]]
    assert [int(row[0]) for row in sums] == [int(predicted(batch).sum()) for batch, _ in marks[:3]]


def test_a_model_that_says_the_right_answers_is_marked_right(tmp_path):
    """Marks that are neither all wrong nor all right: labels made of the model's own guesses."""
    trainer = trainer_of("qwen2_5_vl", tmp_path)
    batch = batch_of(trainer)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        guesses = trainer.model.eval()(**inputs, use_cache=False).logits.argmax(-1)
    labels = batch["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] == IGNORE_INDEX, IGNORE_INDEX, guesses[:, :-1])
    answers = trainer.prediction_step(trainer.model, batch | {"labels": labels}, False)[1][:, 3:]
    assert torch.equal(answers[:, 0], answers[:, 1])
    first = (labels[0] != IGNORE_INDEX).nonzero()[0, 0]
    labels[0, first] = (labels[0, first] + 1) % 7
    marked = trainer.prediction_step(trainer.model, batch | {"labels": labels}, False)[1][:, 3:]
    assert torch.equal(marked[0], answers[0] - torch.tensor([0.0, 1.0]))


def test_alignment_of_an_exact_conversion_is_nothing(family, tmp_path):
    """All pairs and full rank give the original's attention outputs; a random model does not."""
    model, processor = original(family)
    whole = convert(
        model,
        processor,
        records(family),
        ConversionConfig(qk_rope_head_dim=64, fold=False, factorization="none"),
    )
    errors = []
    for converted in (whole, random_mla(family)[0]):
        trainer = trainer_of(family, tmp_path, model=converted, alignment=1.0)
        errors.append(step(trainer))
    assert errors[0] < 1e-8
    assert errors[1] > 0.1


def test_alignment_teaches_each_layer_on_the_originals_inputs(tmp_path):
    """A layer's gradient does not change when a layer below it does."""
    found = []
    for broken in (False, True):
        model, _ = random_mla("qwen2_5_vl")
        if broken:
            nn.init.normal_(decoder_layers(model)[0].self_attn.o_proj.weight, std=0.5)
        trainer = trainer_of("qwen2_5_vl", tmp_path, model=model, alignment=1.0)
        step(trainer)
        attentions = [layer.self_attn for layer in decoder_layers(trainer.model)]
        found.append([attention.q_proj.weight.grad.clone() for attention in attentions])
    assert not torch.allclose(found[0][0], found[1][0])
    for whole, after in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(whole, after)
        assert float(whole.abs().max()) > 0


@pytest.mark.parametrize("alignment", [0.0, 1.0])
def test_gradient_checkpointing_changes_nothing(family, tmp_path, alignment):
    found = []
    for checkpointing in (False, True):
        trainer = trainer_of(family, tmp_path, gradient_checkpointing=checkpointing, alignment=alignment)
        step(trainer)
        found.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_text_alone_leaves_zero_gradients_not_none(family, tmp_path):
    """Processes of one run must agree on what has a gradient, whatever chats each has."""
    trainer = trainer_of(family, tmp_path, chats=[TEXT_ONLY] * 3)
    found = gradients(trainer, batch_of(trainer))
    assert set(found) == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    vision = [gradient for name, gradient in found.items() if ".vision." in name]
    assert vision
    assert all(bool((gradient == 0).all()) for gradient in vision)


def test_a_teacher_shares_what_is_frozen(family):
    teacher, processor = original(family)
    student = convert(
        teacher, processor, records(family), ConversionConfig(qk_rope_head_dim=16, d_kv=8, samples=5)
    )
    set_trained(student, "attention-and-norms")
    untouched = copy.deepcopy(teacher)
    batch = encode_with_labels(processor, records(family)[:2], student.visual_token_ids)
    expected = answer_log_probs(untouched, batch)
    shared = share_frozen(teacher, student)
    assert torch.equal(answer_log_probs(teacher, batch), expected)
    own = {p.data_ptr() for p in student.parameters()}
    alone = [n for n, p in teacher.named_parameters() if p.data_ptr() not in own]
    assert all("self_attn" in name or "norm" in name for name in alone)
    assert shared > 0.6 * sum(p.numel() for p in teacher.parameters())
