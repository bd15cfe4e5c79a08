"""What a parameter is to a width rule: roles, width ratios, rules, groups, targets and the steady state."""
