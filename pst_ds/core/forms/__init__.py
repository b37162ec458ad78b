"""Update forms: how the weight of a layer is updated while it trains. One form per file."""
