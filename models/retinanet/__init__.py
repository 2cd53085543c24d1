"""RetinaNet: its FPN, its head with losses and predictions, anchor targets and metric.

It never reads or resizes images, and never applies NMS, which `core.inference` does.
"""
