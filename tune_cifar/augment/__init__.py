"""Augmentation: a policy is plain data (`policies`), and two interpreters turn it and drawn numbers into pictures.

`batched` works on whole batches on the device, `reference` on one image at a time through albumentations. The same
draws give the same uint8 picture in both (the warp within a stated tolerance), so each is a test of the other.
"""
