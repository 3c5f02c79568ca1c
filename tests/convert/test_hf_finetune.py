"""An exported model learns on, in PEFT and in transformers' Trainer, and comes back."""

from __future__ import annotations

import hf_models
import pytest
import torch
from hf_models import GROUPED, LLAMA, loaded

from megatron_mhc.convert.hf.export import export
from megatron_mhc.convert.hf.restore import restore
from megatron_mhc.convert.source import open_source

STEPS, TOKENS = 20, 16
RESIDUALS = {
    'standard': '--residual-type standard',
    'hc': '--residual-type hc',
    'mhc': '--residual-type mhc --mhc-init identity',
    'single-pass': '--residual-type mhc --mhc-single-pass --mhc-init identity',
}


@pytest.fixture(params=RESIDUALS)
def exported(request, megatron, parse, random_seed, tmp_path):
    args = hf_models.arguments(parse, f'{RESIDUALS[request.param]} {LLAMA} {GROUPED}')
    export(hf_models.checkpoint(args, tmp_path / 'run'), tmp_path / 'hf')
    return tmp_path / 'hf'


def trained(model, folder, rate: float) -> list[float]:
    """The losses of some steps on text that repeats itself."""
    from transformers import Trainer, TrainingArguments

    rows = [{'input_ids': (ids := list(range(i, i + TOKENS))), 'labels': ids} for i in range(8)]
    options = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=rate,
        logging_steps=1,
        save_strategy='no',
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(model=model, args=options, train_dataset=rows)
    trainer.train()
    return [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(TOKENS)[None]).logits


def test_lora_learns_and_its_adapter_loads(exported, tmp_path):
    peft = pytest.importorskip('peft', reason="pip install 'megatron-mhc[evaluate]', as CI does")
    config = peft.LoraConfig(
        task_type='CAUSAL_LM', r=4, target_modules='all-linear', exclude_modules=['lm_head']
    )
    before = logits(loaded(exported))
    model = peft.get_peft_model(loaded(exported), config)
    losses = trained(model, tmp_path / 'trainer', 1e-2)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3
    # Every adapter was used, those of the mappings too.
    moved = {n: bool(p.any()) for n, p in model.named_parameters() if 'lora_B' in n}
    assert moved and all(moved.values())
    has_streams = model.config.model_type == 'megatron_mhc'
    assert any('mapping_proj' in name for name in moved) == has_streams
    model.save_pretrained(tmp_path / 'adapter')
    base = loaded(exported)
    assert torch.equal(logits(base), before)
    again = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter')
    assert torch.equal(logits(again), logits(model))
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('exported', ['mhc'], indirect=True)
def test_a_fine_tuned_model_is_saved_loaded_and_brought_back(exported, tmp_path):
    model = loaded(exported)
    losses = trained(model, tmp_path / 'trainer', 3e-3)
    assert losses[-1] < losses[0] - 0.3
    model.save_pretrained(tmp_path / 'tuned')
    again = loaded(tmp_path / 'tuned')
    assert torch.equal(logits(again), logits(model))
    restore(tmp_path / 'tuned', tmp_path / 'back')
    # As Megatron's weights, which give the same logits.
    export(tmp_path / 'back', tmp_path / 'round')
    for name, tensor in loaded(tmp_path / 'round').state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert open_source(tmp_path / 'back').args.num_layers == 3
