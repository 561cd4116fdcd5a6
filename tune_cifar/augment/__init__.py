"""Augmentation: a policy is plain data (`policies`), and two interpreters apply it to images.

`batched` works on whole batches on the device, `reference` on one image at a time through
albumentations. Equal draws give equal uint8 images in both (the warp within a stated tolerance), so
each is a test of the other.
"""
