"""Methods that train: stars, soups from several trainings, sparse soups."""
