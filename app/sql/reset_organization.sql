-- Leave an organization to its requests' flags and the defaults again.
-- $1 organization_id, text
DELETE FROM mollifier.organization_settings WHERE organization_id = $1
