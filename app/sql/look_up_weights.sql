-- The organizations whose weight in the drain is not 1.
-- Returns organization_id, weight
SELECT organization_id, weight FROM mollifier.organization_settings WHERE weight <> 1
