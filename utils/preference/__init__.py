"""Direct preference optimisation: from log-probabilities of judged answers to losses and figures."""
