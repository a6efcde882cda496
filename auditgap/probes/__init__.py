"""Probes: what can be read from a model's activations, and what could have been read from the text
alone.

    # [n, L, D], once
    features = cached_features(loaded, conversations, folder=Path("features"))
    # the latent monitor
    fitted = fit(features, labels, groups)
    # must lose, or the monitor reads words
    text_baselines(texts, lengths, labels, fitted.train_index)

Method: arXiv 2606.08044, section 4.
"""

#: How a probe is fitted unless something else is asked for: the paper's values.
EPOCHS, BATCH, LR, WEIGHT_DECAY, HELDOUT = 30, 32, 3e-4, 1e-4, 0.2
