"""The methods that are a combination of `forget_loss`, `projection` and `alpha`."""

BASELINES = {
    "finetune": {"projection": "none", "forget_loss": "ascent", "alpha": 1.0},
    "gradient_ascent": {"projection": "none", "forget_loss": "ascent", "alpha": 0.0},
    "graddiff": {"projection": "none", "forget_loss": "ascent", "alpha": 0.5},  # NegGrad+ under another name
    "npo": {"projection": "none", "forget_loss": "npo", "alpha": 0.5},
    "simnpo": {"projection": "none", "forget_loss": "simnpo", "alpha": 0.5},
    # PCGrad's and GDR's projection, on the mean retain gradient, here whether or not the two conflict
    "mean_projection": {"projection": "mean", "forget_loss": "ascent", "alpha": 0.5},
    "orthograd": {"projection": "orthogonal", "forget_loss": "ascent", "alpha": 0.5},
    "orthograd_per_tensor": {
        "projection": "orthogonal",
        "projection_scope": "per_tensor",
        "forget_loss": "ascent",
        "alpha": 0.5,
    },
    "orthograd_npo": {"projection": "orthogonal", "forget_loss": "npo", "alpha": 0.5},
}
