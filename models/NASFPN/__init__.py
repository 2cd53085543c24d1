"""The stacked pyramids of NAS-FPN, the head with batch normalisation, and the crops of its training input.

It never defines losses or anchor targets, which are those of `models.retinanet`.
"""
