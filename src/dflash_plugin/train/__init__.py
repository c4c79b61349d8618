"""Making a drafter for any target: data, masks, losses, the loop and the export."""
