//! The class of an event: its kind and its severity, each from a closed list. Coarse enough for
//! metrics, and as fine as the alerts need that Kong recommends.

use super::schema::Type;

/// Kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventKind {
    /// A request to the API.
    Access,
    /// An authentication that succeeded.
    AuthenticationSuccess,
    /// An authentication that failed for another reason than the next two.
    AuthenticationFailure,
    /// An authentication with a locked account.
    AuthenticationLocked,
    /// An authentication with a disabled account.
    AuthenticationDisabled,
    /// An authorization that was granted.
    AuthorizationGranted,
    /// An authorization that was denied, or does not say that it was granted.
    AuthorizationDenied,
    /// Anything that Kong itself did: no alert on users should count it.
    KongInitiated,
    /// An event that Konnect does not document.
    Other,
}

impl EventKind {
    /// Every kind, in the order of declaration.
    pub const ALL: [Self; 9] = [
        Self::Access,
        Self::AuthenticationSuccess,
        Self::AuthenticationFailure,
        Self::AuthenticationLocked,
        Self::AuthenticationDisabled,
        Self::AuthorizationGranted,
        Self::AuthorizationDenied,
        Self::KongInitiated,
        Self::Other,
    ];

    /// Returns the value of the label in the metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::AuthenticationSuccess => "authentication_success",
            Self::AuthenticationFailure => "authentication_failure",
            Self::AuthenticationLocked => "authentication_locked",
            Self::AuthenticationDisabled => "authentication_disabled",
            Self::AuthorizationGranted => "authorization_granted",
            Self::AuthorizationDenied => "authorization_denied",
            Self::KongInitiated => "kong_initiated",
            Self::Other => "other",
        }
    }
}

/// Severity of an event, of those that Konnect documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EventSeverity {
    /// 0: an authentication that succeeded.
    Zero,
    /// 1: the default, a failed authentication too.
    One,
    /// 6: a locked or disabled account, a denied authorization, an access with 401 or 403.
    Six,
    /// 7: an authentication in an unknown or invalid state.
    Seven,
    /// 10: an access with 500.
    Ten,
    /// Any other, or none.
    Other,
}

impl EventSeverity {
    /// Every severity, in the order of declaration.
    pub const ALL: [Self; 6] = [Self::Zero, Self::One, Self::Six, Self::Seven, Self::Ten, Self::Other];

    /// Returns the value of the label in the metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zero => "0",
            Self::One => "1",
            Self::Six => "6",
            Self::Seven => "7",
            Self::Ten => "10",
            Self::Other => "other",
        }
    }

    fn of(severity: &str) -> Self {
        Self::ALL.into_iter().find(|known| known.as_str() == severity).unwrap_or(Self::Other)
    }
}

/// Kind and severity of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventClass {
    /// Its kind.
    pub kind: EventKind,
    /// Its severity.
    pub severity: EventSeverity,
}

/// Fields that decide the class of an event, as text; none where a field is missing or ambiguous.
#[derive(Debug, Default)]
pub(in crate::wire) struct ClassFields<T> {
    pub(in crate::wire) name: Option<T>,
    pub(in crate::wire) severity: Option<T>,
    pub(in crate::wire) granted: Option<T>,
    pub(in crate::wire) kong_initiated: Option<T>,
}

impl EventClass {
    pub(in crate::wire) fn of<T: AsRef<str>>(fields: &ClassFields<T>) -> Self {
        let name = fields.name.as_ref().map_or("", AsRef::as_ref);
        let is_true = |field: &Option<T>| field.as_ref().is_some_and(|text| text.as_ref() == "true");
        let kind = match Type::of(name) {
            _ if is_true(&fields.kong_initiated) => EventKind::KongInitiated,
            Type::Access => EventKind::Access,
            Type::Authentication => match name.strip_prefix("AUTHENTICATION_OUTCOME_") {
                Some("SUCCESS") => EventKind::AuthenticationSuccess,
                Some("LOCKED") => EventKind::AuthenticationLocked,
                Some("DISABLED") => EventKind::AuthenticationDisabled,
                _ => EventKind::AuthenticationFailure,
            },
            Type::Authorization if is_true(&fields.granted) => EventKind::AuthorizationGranted,
            Type::Authorization => EventKind::AuthorizationDenied,
            Type::Other => EventKind::Other,
        };
        let severity = fields.severity.as_ref().map_or("", AsRef::as_ref);
        Self { kind, severity: EventSeverity::of(severity) }
    }
}

#[cfg(test)]
mod tests {
    use crate::wire::line::Line;

    fn class(line: &str) -> (&'static str, &'static str) {
        let class = Line::parse(line.as_bytes()).unwrap().class();
        (class.kind.as_str(), class.severity.as_str())
    }

    fn cef(name: &str, severity: &str, extension: &str) -> String {
        format!("2023-05-19T00:03:39Z konghq.com CEF:0|KongInc|Konnect|1.0|c|{name}|{severity}|{extension}")
    }

    #[test]
    fn konnects_documented_events_have_their_class() {
        for (name, severity, member, expected) in [
            ("Ingress", "1", "\"status\":200", ("access", "1")),
            ("Ingress", "6", "\"status\":403", ("access", "6")),
            ("Ingress", "10", "\"status\":500", ("access", "10")),
            ("AUTHENTICATION_OUTCOME_SUCCESS", "0", "\"success\":true", ("authentication_success", "0")),
            ("AUTHENTICATION_OUTCOME_NOT_FOUND", "1", "\"success\":false", ("authentication_failure", "1")),
            ("AUTHENTICATION_OUTCOME_INVALID_PASSWORD", "1", "\"a\":1", ("authentication_failure", "1")),
            ("AUTHENTICATION_OUTCOME_TOKEN_EXPIRED", "1", "\"a\":1", ("authentication_failure", "1")),
            ("AUTHENTICATION_OUTCOME_LOCKED", "6", "\"a\":1", ("authentication_locked", "6")),
            ("AUTHENTICATION_OUTCOME_DISABLED", "6", "\"a\":1", ("authentication_disabled", "6")),
            ("AUTHENTICATION_OUTCOME_INVALID", "7", "\"a\":1", ("authentication_failure", "7")),
            ("Authz.portals", "1", "\"granted\":true", ("authorization_granted", "1")),
            ("Authz.portals", "1", "\"granted\":\"true\"", ("authorization_granted", "1")),
            ("Authz.portals", "6", "\"granted\":false", ("authorization_denied", "6")),
            ("Authz.portals", "6", "\"a\":1", ("authorization_denied", "6")),
            ("Ingress", "10", "\"kong_initiated\":true", ("kong_initiated", "10")),
            ("Ingress", "10", "\"kong_initiated\":false", ("access", "10")),
            ("Something.New", "5", "\"a\":1", ("other", "other")),
            ("", "07", "\"a\":1", ("other", "other")),
        ] {
            let members = format!("\"name\":\"{name}\",\"severity\":{severity},{member}");
            if severity != "07" {
                assert_eq!(class(&format!("{{{members}}}")), expected, "{members}");
                assert_eq!(class(&format!("{{\"event\":{{{members}}}}}")), expected, "{members}");
            }
            let extension = member.replace('"', "").replace(':', "=");
            assert_eq!(class(&cef(name, severity, &extension)), expected, "{name} {severity}");
        }
        assert_eq!(class("{}"), ("other", "other"));
        assert_eq!(class(r#"{"name":{"a":1},"severity":null}"#), ("other", "other"));
    }

    #[test]
    fn what_a_caller_writes_into_a_value_changes_no_class() {
        let forged = "granted=false rt=1 src=a trace_id=1 org_id=o principal_id=p action=x \
                      user_agent=a granted=true kong_initiated=true severity=0 name=Ingress";
        assert_eq!(class(&cef("Authz.portals", "6", forged)), ("authorization_denied", "6"));
        assert_eq!(
            class(r#"{"name":"Authz.x","severity":6,"granted":true,"granted":true}"#),
            ("authorization_denied", "6")
        );
    }
}
