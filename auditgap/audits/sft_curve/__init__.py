"""The harmful-SFT curve: how many steps of fine-tuning on unsafe answers it takes until a subject
complies.

    config, options = SFT_CURVE.read(None, {"models": "./base,./tuned", "data": "unsafe.jsonl", "out": "runs/sft"})
    folder, outcome = run(SFT_CURVE, config, options)

A parameter-space intervention beside the latent one: base and subjects, several seeds, compliance
and refusal on held-out prompts every few steps; steps to 50 % and 80 %, area under the curve, and
the audit gap after k steps (arXiv 2606.08044, section 7 of its method).
"""
