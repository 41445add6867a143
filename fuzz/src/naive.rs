//! The line format once more, as simple as it can be written down.

use std::collections::{BTreeMap, BTreeSet};

/// What a line comes to.
#[derive(Debug, Default)]
pub struct Read {
    /// `cef`, `json` or `cps`.
    pub format: &'static str,
    /// Every field with the text of its value; none for an array, an object or `null`.
    pub fields: BTreeMap<String, Option<String>>,
    /// The keys about which the line is not clear.
    pub ambiguous: BTreeSet<String>,
    /// The signature as it is spelled.
    pub signature: Option<Vec<u8>>,
    /// The messages that it may have been made over, the likelier first.
    pub messages: Vec<Vec<u8>>,
}

/// Reads a line; none when it is no event.
pub fn read(line: &[u8]) -> Option<Read> {
    let text = text_of(line);
    let first = text.chars().find(|character| *character != ' ' && *character != '\t');
    let mut read = if first == Some('{') { json(&text) } else { cef(&text) }?;
    let shown = |text: &str| String::from_utf8_lossy(&bytes_of(text)).into_owned();
    let fields = std::mem::take(&mut read.fields);
    read.fields = fields.into_iter().map(|(key, value)| (shown(&key), value.as_deref().map(shown))).collect();
    read.ambiguous = read.ambiguous.iter().map(|key| shown(key)).collect();
    Some(read)
}

/// First of the characters that represent bytes which are not UTF-8.
const NO_CHARACTER: u32 = 0x10_fe00;

/// The line as text from which its bytes come back.
fn text_of(line: &[u8]) -> String {
    let mut text = String::new();
    for chunk in line.utf8_chunks() {
        for character in chunk.valid().chars() {
            // One that would be taken for a byte is written as its own bytes.
            if u32::from(character) >= NO_CHARACTER {
                let bytes = character.to_string().into_bytes();
                text.extend(bytes.iter().filter_map(|byte| char::from_u32(NO_CHARACTER + u32::from(*byte))));
            } else {
                text.push(character);
            }
        }
        text.extend(
            chunk.invalid().iter().filter_map(|byte| char::from_u32(NO_CHARACTER + u32::from(*byte))),
        );
    }
    text
}

fn bytes_of(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for character in text.chars() {
        match u32::from(character).checked_sub(NO_CHARACTER).map(u8::try_from) {
            Some(Ok(byte)) => bytes.push(byte),
            _ => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

/// The header's keys in their order.
const HEADER: [&str; 7] =
    ["cef_version", "event_vendor", "event_product", "event_version", "event_class_id", "name", "severity"];

fn cef(text: &str) -> Option<Read> {
    let start = (0..text.len()).find(|at| {
        text.is_char_boundary(*at) && is_at(text, *at, "CEF:") && (*at == 0 || is_at(text, at - 1, " "))
    })?;
    // Behind `CEF:`: up to seven pieces, each ended by a bar without a backslash before it.
    let (mut pieces, mut piece, mut ends) = (Vec::new(), String::new(), Vec::new());
    let mut escaped = false;
    for (at, character) in text[start + 4..].char_indices() {
        if character == '|' && !escaped {
            pieces.push(std::mem::take(&mut piece));
            ends.push(start + 4 + at + 1);
            if pieces.len() == 7 {
                break;
            }
        } else {
            piece.push(character);
        }
        escaped = character == '\\' && !escaped;
    }
    if pieces.len() < 6 || pieces[0].is_empty() || !pieces[0].chars().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    // A Dev Portal event may lack the class: then a severity and the extension follow the name.
    let without_class = is_severity(&pieces[5])
        && (pieces.len() == 6 || pieces[6].split(' ').next().is_some_and(|word| key_of(word).is_some()));
    if !without_class && pieces.len() < 7 {
        return None;
    }
    let mut names = HEADER.to_vec();
    if without_class {
        names.remove(4);
    }
    let extension = ends[names.len() - 1];

    let mut read = Read { format: "cef", ..Read::default() };
    if start > 0 {
        let before = &text[..start - 1];
        // The last word is the host, unless it is the time of day.
        let stamp = match before.rsplit_once(' ') {
            Some((stamp, host)) if !is_time(host) => stamp,
            _ => before,
        };
        if !stamp.is_empty() {
            read.fields.insert("event_ts".to_owned(), Some(stamp.to_owned()));
        }
    }
    for (name, piece) in names.iter().zip(&pieces) {
        read.fields.insert((*name).to_owned(), Some(unescaped(piece, &[('|', '|'), ('\\', '\\')])));
    }
    let mut end = text.len();
    if let Some(at) = text.rfind(" sig=").filter(|at| *at >= extension) {
        read.signature = Some(bytes_of(&text[at + 5..]));
        read.fields.insert("sig".to_owned(), Some(text[at + 5..].to_owned()));
        read.messages.push(bytes_of(&text[..at]));
        end = at;
    }

    // Word by word: one that begins with `key=` begins a pair, the others go on with its value.
    let mut pairs: Vec<(&str, String)> = Vec::new();
    for word in text[extension..end].split(' ') {
        match (key_of(word), pairs.last_mut()) {
            (Some((key, value)), _) => pairs.push((key, value.to_owned())),
            (None, Some((_, value))) => *value += &format!(" {word}"),
            (None, None) => {}
        }
    }
    let of_header = |name: &str| {
        let at = names.iter().position(|known| *known == name);
        at.map_or("", |at| pieces[at].as_str())
    };
    for (key, value) in
        producers(&pairs, &always_there(of_header("name"), of_header("severity")), &mut read.ambiguous)
    {
        let escapes = [('=', '='), ('\\', '\\'), ('n', '\n'), ('r', '\r')];
        read.fields.insert(key, Some(unescaped(&value, &escapes)));
    }
    Some(read)
}

/// Returns the pairs that the producer wrote, by the rules of `docs/fields.md`.
fn producers(
    pairs: &[(&str, String)],
    always_there: &[&str],
    ambiguous: &mut BTreeSet<String>,
) -> Vec<(String, String)> {
    const FREE: [&str; 4] = ["user_agent", "request", "query", "principal_name"];
    // Each with the number of pieces of free text that have ended before it.
    let mut found: Vec<(usize, &str, String)> = Vec::new();
    let (mut ended, mut in_free_text) = (0, false);
    for (key, value) in pairs {
        if in_free_text {
            let count = pairs.iter().filter(|(other, _)| other == key).count();
            if count > 1 || !always_there.contains(key) {
                let (_, free, text) = found.last_mut().expect("the free text");
                *text += &format!(" {key}={value}");
                ambiguous.extend([(*key).to_owned(), (*free).to_owned()]);
                continue;
            }
            ended += 1;
        }
        in_free_text = FREE.contains(key);
        if HEADER.contains(key) || ["event_ts", "sig"].contains(key) {
            ambiguous.insert((*key).to_owned());
        } else {
            found.push((ended, key, value.clone()));
        }
    }
    let mut fields = Vec::new();
    for (ended, key, value) in &found {
        let all = found.iter().filter(|(_, other, _)| other == key).count();
        let in_front = found.iter().filter(|(ended, other, _)| other == key && *ended == 0).count();
        if all > 1 {
            ambiguous.insert((*key).to_owned());
        }
        if all == 1 || (*ended == 0 && in_front == 1) {
            fields.push(((*key).to_owned(), value.clone()));
        }
    }
    fields
}

/// The extension keys that every event of a type and outcome has.
fn always_there(name: &str, severity: &str) -> Vec<&'static str> {
    let mut keys = vec!["rt", "src", "trace_id", "user_agent"];
    let is_login = name.starts_with("AUTHENTICATION_OUTCOME_");
    if is_login {
        keys.extend(["request", "success"]);
    } else if name.starts_with("Authz.") {
        keys.extend(["action", "granted"]);
    } else if name == "Ingress" {
        keys.extend(["request", "act", "status", "query"]);
    } else {
        return keys;
    }
    let is_without_principal =
        (is_login && name != "AUTHENTICATION_OUTCOME_SUCCESS") || (name == "Ingress" && severity == "6");
    if !is_without_principal {
        keys.extend(["org_id", "principal_id"]);
    }
    keys
}

fn is_time(word: &str) -> bool {
    let parts: Vec<&str> = word.split(':').collect();
    parts.len() == 3
        && parts.iter().all(|part| part.len() == 2 && part.chars().all(|digit| digit.is_ascii_digit()))
}

fn is_at(text: &str, at: usize, part: &str) -> bool {
    text.as_bytes()[at..].starts_with(part.as_bytes())
}

/// A word's key and the rest of it.
fn key_of(word: &str) -> Option<(&str, &str)> {
    let (key, value) = word.split_once('=')?;
    let is_key = !key.is_empty() && key.chars().all(|it| it.is_ascii_alphanumeric() || "_.,-[]".contains(it));
    is_key.then_some((key, value))
}

fn is_severity(text: &str) -> bool {
    ["Unknown", "Low", "Medium", "High", "Very-High"].contains(&text)
        || (!text.is_empty() && text.chars().all(|digit| digit.is_ascii_digit()))
}

fn unescaped(text: &str, escapes: &[(char, char)]) -> String {
    let (mut out, mut rest) = (String::new(), text.chars());
    while let Some(character) = rest.next() {
        let next = rest.clone().next();
        match escapes.iter().find(|(escaped, _)| character == '\\' && next == Some(*escaped)) {
            Some((_, meant)) => {
                out.push(*meant);
                rest.next();
            }
            None => out.push(character),
        }
    }
    out
}

/// A member of a JSON object.
struct Member {
    /// As it is spelled, without the quotes.
    spelled: String,
    key: String,
    /// Position of the key's opening quote.
    key_at: usize,
    value_at: usize,
    value_end: usize,
}

fn json(text: &str) -> Option<Read> {
    let outer = object(text)?;
    let inner = wrapped(text, &outer).map(|(start, end)| (start, &text[start..end]));
    let mut read = Read { format: if inner.is_some() { "cps" } else { "json" }, ..Read::default() };
    let mut signed = signature(text, &outer)?;
    let (fields, of) = match inner {
        None => (outer, text),
        Some((start, inner)) => {
            let members = object(inner)?;
            match (&signed, signature(inner, &members)?) {
                (Some(_), Some(_)) => return None,
                (None, Some((value, from, to))) => {
                    signed = Some((value, start + from, start + to));
                    let plain = [r#"{"event":"#, r#"{"event": "#].contains(&&text[..start]);
                    // A wrapper in a wrapper is signed as a whole or not at all.
                    if plain
                        && text.get(start + inner.len()..) == Some("}")
                        && wrapped(inner, &members).is_none()
                    {
                        read.messages.push(bytes_of(&[&inner[..from], &inner[to..]].concat()));
                    }
                }
                (_, None) => {}
            }
            (members, inner)
        }
    };
    if let Some((value, from, to)) = signed {
        read.signature = Some(bytes_of(&value));
        read.messages.insert(0, bytes_of(&[&text[..from], &text[to..]].concat()));
    }
    for member in &fields {
        let shown = |key: &str| String::from_utf8_lossy(&bytes_of(key)).into_owned();
        if fields.iter().filter(|other| shown(&other.key) == shown(&member.key)).count() > 1 {
            read.ambiguous.insert(member.key.clone());
        } else {
            read.fields.insert(member.key.clone(), scalar(member.value(of)));
        }
    }
    Some(read)
}

/// Returns the inner object of a wrapper: its one member `event`, next to which there may be a
/// signature.
fn wrapped(text: &str, members: &[Member]) -> Option<(usize, usize)> {
    let others: Vec<&Member> = members.iter().filter(|member| member.key != "sig").collect();
    match others[..] {
        [member] if member.key == "event" && text[member.value_at..].starts_with('{') => {
            Some((member.value_at, member.value_end))
        }
        _ => None,
    }
}

impl Member {
    fn value<'a>(&self, text: &'a str) -> &'a str {
        &text[self.value_at..self.value_end]
    }
}

/// An object's signature and the bytes that go with it; an error where it is doubtful.
fn signature(text: &str, members: &[Member]) -> Option<Option<(String, usize, usize)>> {
    let found: Vec<usize> = (0..members.len()).filter(|index| members[*index].key == "sig").collect();
    let index = match found[..] {
        [] => return Some(None),
        [index] => index,
        _ => return None,
    };
    let member = &members[index];
    let value = member.value(text);
    if member.spelled != "sig" || !value.starts_with('"') {
        return None;
    }
    if ![r#""sig":"#, r#""sig": "#].contains(&&text[member.key_at..member.value_at]) {
        return None;
    }
    let (mut from, mut to) = (member.key_at, member.value_end);
    let before = &text[..from];
    if index == 0 {
        match &text[to..to + 1] {
            "," => to += 1,
            "}" => {}
            _ => return None,
        }
    } else if before.ends_with(", ") {
        from -= 2;
    } else if before.ends_with(',') {
        from -= 1;
    } else {
        return None;
    }
    Some(Some((value[1..value.len() - 1].to_owned(), from, to)))
}

/// A scalar's text; an unreadable string's spelling.
fn scalar(value: &str) -> Option<String> {
    match value.as_bytes()[0] {
        b'{' | b'[' | b'n' => None,
        b'"' => Some(string(value).unwrap_or_else(|| value[1..value.len() - 1].to_owned())),
        _ => Some(value.to_owned()),
    }
}

/// The members of a text that is one object and nothing else (RFC 8259).
fn object(text: &str) -> Option<Vec<Member>> {
    let mut members = Vec::new();
    let mut reader = Reader { bytes: text.as_bytes(), at: 0 };
    reader.space();
    reader.members(&mut |key_at, key_end, value_at, value_end| {
        let spelled = text[key_at + 1..key_end - 1].to_owned();
        let key = string(&text[key_at..key_end])?;
        members.push(Member { spelled, key, key_at, value_at, value_end });
        Some(())
    })?;
    reader.space();
    (reader.at == text.len()).then_some(members)
}

/// RFC 8259, rule by rule.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn take(&mut self, text: &str) -> Option<()> {
        self.bytes[self.at..].starts_with(text.as_bytes()).then(|| self.at += text.len())
    }

    /// Calls `found` with the bounds of each member's key and value.
    fn members(&mut self, found: &mut dyn FnMut(usize, usize, usize, usize) -> Option<()>) -> Option<()> {
        self.take("{")?;
        self.space();
        if self.take("}").is_some() {
            return Some(());
        }
        loop {
            self.space();
            let key = self.at;
            self.string()?;
            let key_end = self.at;
            self.space();
            self.take(":")?;
            self.space();
            let value = self.at;
            self.value()?;
            found(key, key_end, value, self.at)?;
            self.space();
            if self.take("}").is_some() {
                return Some(());
            }
            self.take(",")?;
        }
    }

    fn value(&mut self) -> Option<()> {
        match self.peek()? {
            b'{' => self.members(&mut |_, _, _, _| Some(())),
            b'[' => {
                self.at += 1;
                self.space();
                if self.take("]").is_some() {
                    return Some(());
                }
                loop {
                    self.space();
                    self.value()?;
                    self.space();
                    if self.take("]").is_some() {
                        return Some(());
                    }
                    self.take(",")?;
                }
            }
            b'"' => self.string(),
            b't' => self.take("true"),
            b'f' => self.take("false"),
            b'n' => self.take("null"),
            _ => self.number(),
        }
    }

    fn string(&mut self) -> Option<()> {
        self.take("\"")?;
        loop {
            let byte = self.peek()?;
            self.at += 1;
            match byte {
                b'"' => return Some(()),
                0..=0x1f => return None,
                b'\\' => {
                    let escape = self.peek()?;
                    self.at += 1;
                    match escape {
                        b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {}
                        b'u' => {
                            let digits = self.bytes.get(self.at..self.at + 4)?;
                            digits.iter().all(u8::is_ascii_hexdigit).then(|| self.at += 4)?;
                        }
                        _ => return None,
                    }
                }
                _ => {}
            }
        }
    }

    fn number(&mut self) -> Option<()> {
        let _ = self.take("-");
        if self.take("0").is_none() {
            self.digits()?;
        }
        if self.take(".").is_some() {
            self.digits()?;
        }
        if self.take("e").or_else(|| self.take("E")).is_some() {
            let _ = self.take("+").or_else(|| self.take("-"));
            self.digits()?;
        }
        Some(())
    }

    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }
}

/// A string that [`Reader::string`] has passed; none when an escape names no character.
fn string(quoted: &str) -> Option<String> {
    let mut units: Vec<u16> = Vec::new();
    let mut rest = quoted[1..quoted.len() - 1].chars();
    while let Some(character) = rest.next() {
        if character != '\\' {
            units.extend_from_slice(character.encode_utf16(&mut [0; 2]));
            continue;
        }
        units.push(match rest.next()? {
            'b' => 8,
            'f' => 12,
            'n' => 10,
            'r' => 13,
            't' => 9,
            'u' => u16::from_str_radix(&rest.by_ref().take(4).collect::<String>(), 16).ok()?,
            other => u16::try_from(u32::from(other)).ok()?,
        });
    }
    String::from_utf16(&units).ok()
}
