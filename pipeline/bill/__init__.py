"""What a run costs: prices, sums over what was published, and what people see of them."""
