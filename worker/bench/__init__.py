"""What does this worker gain, as ratios measured in one run? (machines are shared and noisy; ratios are not)"""
