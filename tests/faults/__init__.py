"""Faults, each tested at the lowest layer that shows it.

test_end_to_end.py and test_long.py inject them into complete searches.
"""

# The random sampler draws from (search seed, trial number) alone: an interrupted search proposes
# what an uninterrupted one does, whatever the order in which its trials end.
SPACE = """
space: faulty
source: the network of s7 on a handful of images
published: {accuracy: 0.9045, measured: as s7}
corrects: [as s7]
baseline:
  model: s7
  dropout: 0.05
  optimizer: sgd
  nesterov: false
  weight_decay: 0.0
  schedule: onecycle
  max_lr: 0.05
  pct_start: 0.3
  div_factor: 25.0
  final_div_factor: 1.0e+4
  anneal_strategy: cos
  cycle_momentum: true
  base_momentum: 0.85
  max_momentum: 0.95
  batch_size: 5
  epochs: 4
  label_smoothing: 0.0
  train_size: 100
  val_size: 40
  seed: 0
  augment_backend: batched
  crop_pad: 0
  hflip_p: 0.3
search:
  max_lr: {low: 3.0e-3, high: 0.3, log: true}
  dropout: {low: 0.0, high: 0.2}
budget:
  full:
    trials: 8
    rungs: [1, 2, 4]
    reduction_factor: 2
    sampler: {kind: random}
    seed: 0
  cpu:
    trials: 8
    rungs: [1, 2, 4]
    reduction_factor: 2
    sampler: {kind: random}
    seed: 0
"""
