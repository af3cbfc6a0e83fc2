"""Losses of many weight sets: data, scores, predictions, the objective that training follows."""
