"""What the package costs: training steps, log-likelihoods, posteriors, beside their baselines."""
