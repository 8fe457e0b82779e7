"""``vision``: pictures drawn on the spot, with questions whose exact answers are known because we drew them."""
