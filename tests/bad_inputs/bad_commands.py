"""Bad lines of every command but the launcher: flags by kind, choices, and combinations."""

from __future__ import annotations

from bad_values import CHOICE, COUNT, FACTOR, FROM_ZERO
from one_line import Row, said, single

CONVERT = 'convert src dst --to mhc'
COMPARE = 'schedule compare --pp 2 --microbatches 4'
SIMULATE = 'schedule simulate --schedule 1f1b --pp 2 --microbatches 4'
SHOW = 'schedule show --schedule 1f1b --pp 2 --microbatches 4'
VALIDATE = 'schedule validate --schedule 1f1b --pp 2 --microbatches 4'

# Line, flags, values that none of them takes.
KINDS = (
    (CONVERT, ('--step',), FROM_ZERO),
    ('recompute', ('--sublayers', '--num-streams', '--hidden-size', '--tokens', '--blocks'), COUNT),
    ('recompute', ('--full',), FROM_ZERO),
    ('recompute', ('--kernel-backend',), CHOICE),
    (SIMULATE, ('--pp', '--microbatches', '--chunks'), COUNT),
    (
        SIMULATE,
        ('--forward', '--input-grad', '--weight-grad', '--recompute', '--hop', '--reduce'),
        FACTOR,
    ),
    (SIMULATE, ('--fused-slot-factor', '--stage-scale'), ('0', *FACTOR)),
    (SIMULATE, ('--recompute-stream', '--schedule'), CHOICE),
    (COMPARE, ('--pp', '--microbatches', '--chunks'), COUNT),
    (VALIDATE, ('--pp', '--microbatches', '--chunks'), COUNT),
    (SHOW, ('--width',), FROM_ZERO),
    (SHOW, ('--format', '--schedule'), CHOICE),
    ('schedule trace t.json', ('--max-exposed-p2p', '--max-idle'), (*FACTOR, '1.5')),
    ('schedule trace t.json', ('--max-post-delay',), FACTOR),
    ('recipe show 3b', ('--gpus', '--tp', '--pp', '--ep', '--dp', '--micro-batch'), COUNT),
    ('recipe show 3b', ('--layout', '--residual-type', '--mhc-manifold'), ('x', 'MHC', '4')),
    ('study 3b', ('--top', '--gpus', '--tp', '--pp', '--vpp', '--ep', '--dp'), COUNT),
    ('study 3b', ('--micro-batch-size', '--num-residual-streams', '--recompute'), COUNT),
    ('study 3b', ('--global-batch-size',), COUNT),
    ('study 3b', ('--schedule', '--residual-type'), CHOICE),
    ('kernels report', ('--hidden-size', '--tokens', '--num-streams', '--arch'), COUNT),
    ('kernels report', ('--dtype',), CHOICE),
    ('kernels accuracy', ('--hidden-size', '--tokens', '--num-streams'), COUNT),
    ('kernels accuracy', ('--seed',), FROM_ZERO),
    ('kernels accuracy', ('--dtype', '--device'), CHOICE),
    ('report .', ('--sublayers',), ('x', '', '1.5', 'nan', '²')),
)

LINES = (
    said('bogus', 'bogus'),
    said('Run', 'Run'),
    said('--bogus', '--bogus'),
    said('', 'command'),
    said('schedule', 'topic'),
    said('schedule bogus', 'topic', 'bogus'),
    said('schedule list extra', 'extra'),
    said('schedule list --pp 3', '--pp'),
    said('schedule show', '--schedule', '--plan'),
    said('schedule show --schedule 1f1b', '1f1b', '--pp', '--microbatches'),
    said('schedule show --schedule 1f1b --pp 2', '1f1b', '--microbatches'),
    said('schedule simulate --pp', '--pp'),
    said(f'{SHOW} --format png', '--format', 'png'),
    said(f'{SHOW} --output /no/such/folder/x.csv --format csv', '--output', '/no/such/folder'),
    said(f'{SHOW} --output / --format csv', '--output', '/'),
    said(f'{SIMULATE} --stage-scale 1', 'stage_scale', '1'),
    said(f'{SIMULATE} --forward 0', 'forward', '0'),
    said(f'{SIMULATE} --pp 99999 --microbatches 99999', '99999'),
    said('schedule compare', '--pp', '--microbatches'),
    said('schedule trace', 'FILE'),
    said('recipe', 'topic'),
    said('recipe show', 'NAME'),
    said('recipe show 4b', 'NAME', '4b'),
    said('recipe list extra', 'extra'),
    said('recipe show 3b --tp 7 --gpus 8', 'tp', '7'),
    said('recipe show 3b --gpus 7', '7'),
    said('recipe show 3b --dp 3 --gpus 8', '--dp', '3', '--gpus', '8'),
    said('recipe show 3b --pp 1000 --gpus 1000', '1000'),
    said('recipe show 3b --residual-type hc --mhc-manifold identity', '--mhc-manifold', 'hc'),
    said('study', '3b'),
    said('study 4b', '4b'),
    said('study 3b --model --num-layers 2', '--model'),
    said('study 3b --calibrate', '--calibrate'),
    said('study --calibrate --pp 2', '--pp', '--calibrate'),
    said('study 3b --schedule 1f1b --vpp 2', '--vpp', '2'),
    said('study 3b --schedule zb-v --pp 1', '--schedule', 'zb-v'),
    said('study 3b --residual-type standard --recompute 4', '--recompute', 'standard'),
    said('study 3b --hardware nosuch', 'nosuch'),
    said('study 3b --set peak', 'peak'),
    said('study 3b --output /dev/null', '/dev/null'),
    said('study 3b --residual-type mudd', '--residual-type', 'mudd'),
    said('recompute --sublayers 3', '--sublayers', '3'),
    said('recompute --sublayers 4 7', '--sublayers', '7'),
    said('recompute --hidden-size 6', '--hidden-size', '6'),
    said('recompute --blocks none sometimes', '--blocks', 'sometimes'),
    said('recompute --sublayers 8 --full 100', '--full', '100'),
    said('recompute --kernel-backend triton --num-streams 3', '--num-streams', '3'),
    said('recompute --tokens 1000000 --hidden-size 65536', '--tokens', '1000000'),
    said('recompute extra', 'extra'),
    said('kernels', 'topic'),
    said('kernels bogus', 'topic', 'bogus'),
    said('kernels report --num-streams 3', '--num-streams', '3'),
    said('kernels report --arch 70', '--arch', '70'),
    said('kernels accuracy --num-streams 3', '--num-streams', '3'),
    said('docs nosuch', 'PAGE', 'nosuch'),
    said('docs flags extra', 'extra'),
    said('doctor extra', 'extra'),
    said('doctor --fix', '--fix'),
    said('patch', 'TREE'),
    said('patch . --apply --diff', '--diff', '--apply'),
    said('patch . --force', '--force'),
    said('report', 'LOGDIR'),
    said('report /no/such/folder', '/no/such/folder'),
    said('convert', 'SRC', 'DST'),
    said('convert src', 'DST'),
    said('convert src dst', '--to'),
    said('convert src dst --to x', '--to', 'x'),
    said(f'{CONVERT} --from x', '--from', 'x'),
    said(f'{CONVERT} --mhc-stream-merge x', '--mhc-stream-merge', 'x'),
    said(f'{CONVERT} --mhc-num-residual-streams four', '--mhc-num-residual-streams', 'four'),
    said(f'{CONVERT} --mhc-sinkhorn-iterations x', '--mhc-sinkhorn-iterations', 'x'),
    said(f'{CONVERT} --mhc-init-gating-factor x', '--mhc-init-gating-factor', 'x'),
    said(f'{CONVERT} --break-symmetry x', '--break-symmetry', 'x'),
    said('run', 'SCRIPT'),
    said('run --device tpu x.py', '--device', 'tpu'),
    said('run --device', '--device'),
    said('run --devices cpu x.py', '--devices'),
    said('run no_such_script.py', 'SCRIPT', 'no_such_script.py'),
    said('run .', 'SCRIPT', '.'),
)


def rows() -> list[Row]:
    found = list(LINES)
    for line, flags, values in KINDS:
        for flag in flags:
            found += single(line, flag, values)
    return found
