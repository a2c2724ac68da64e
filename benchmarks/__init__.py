"""The cost of the package: training steps, log-likelihoods, posteriors, beside baselines."""
