"""What to type: lines of every command and topic, which its ``--help`` ends with."""

from __future__ import annotations

_SHOW = '--schedule zb-v --pp 8 --microbatches 64'
# Command, with its topic -> what follows it on a line.
EXAMPLES = {
    'run': (
        'examples/pretrain_gpt.py --num-layers 8 --hidden-size 512 --residual-type mhc ...',
        '--device cpu examples/pretrain_gpt.py --residual-type mhc ...',
    ),
    'doctor': ('examples/pretrain_gpt.py', '--refusals'),
    'patch': ('~/Megatron-LM', '~/Megatron-LM --apply'),
    'convert': (
        'checkpoints/standard checkpoints/mhc --to mhc --verify',
        'checkpoints/mhc exported --to deepseek-v4 --dry-run',
        'checkpoints/gpt checkpoints/hybrid --to hybrid',
        'checkpoints/mhc exported --to hf --verify',
        'exported checkpoints/back --to megatron',
    ),
    'schedule list': ('',),
    'schedule show': (
        '--schedule zb-v --pp 4 --microbatches 8',
        f'{_SHOW} --format png --output zb-v.png',
        f'{_SHOW} --from 60 --to 90 --width 0',
    ),
    'schedule validate': (_SHOW, '--plan plan.csv'),
    'schedule simulate': (f'{_SHOW} --hop 0.1', '--plan plan.csv --hop 0.1'),
    'schedule compare': ('--pp 8 --microbatches 64', '--pp 8 --microbatches 64 --hop 0.1 --json'),
    'schedule trace': (
        'torch_profile/rank-0.json.gz torch_profile/rank-1.json.gz',
        'torch_profile/rank-0.json.gz --max-exposed-p2p 0.1',
    ),
    'recipe list': ('',),
    'recipe show': ('27b --layout 64gpu', '3b --tp 2 --pp 4 --gpus 64 --json'),
    'study': (
        '27b --gpus 256 --hardware h200',
        '27b --gpus 64 128 --schedule zb-v dualpipev-w --output study',
        '27b --gpus 64 128 256 512 1024 --train-tokens 1T --gpu-hour-price 2.5',
        '27b --gpus 256 --cp 1 2 --precision bf16 fp8 --segments auto full',
        '27b --gpus 256 1024 --launch-scripts DIR',
        '--gpus 64 --model --num-layers 32 --hidden-size 4096 ... --vocab-size 128256',
    ),
    'recompute': ('', '--hidden-size 1024 --tokens 64 --segments none auto 12'),
    'report': (
        'logs/mhc/tensorboard',
        'standard=logs/standard mhc=logs/mhc --output page.html',
        'standard=logs/standard mhc=logs/mhc --output report.png',
    ),
    'kernels report': ('', '--roofline --num-streams 4'),
    'kernels accuracy': ('', '--dtype fp16 --seed 1'),
    'docs': ('', 'troubleshooting'),
}


def examples(page: str) -> list[str]:
    """Lines for the help of a command, of a topic (``schedule show``), or of all (``''``).

    A page above others has the first line of each of them.
    """
    own = [f'megatron-mhc {page} {words}'.strip() for words in EXAMPLES.get(page, ())]
    below = [
        f'megatron-mhc {name} {lines[0]}'.strip()
        for name, lines in EXAMPLES.items()
        if not page or name.startswith(f'{page} ')
    ]
    return own or below
