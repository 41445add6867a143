//! The line format once more, as simple as it can be written down.

use std::collections::BTreeMap;

/// What a line comes to.
#[derive(Debug, Default)]
pub struct Read {
    /// `cef`, `json` or `cps`.
    pub format: &'static str,
    /// Every key in its order with the text of its value; none for an array, an object or `null`.
    pub pairs: Vec<(String, Option<String>)>,
    /// How many of the first pairs were the CEF header.
    pub header: usize,
    /// The signature as it is spelled.
    pub signature: Option<String>,
    /// The messages that it may have been made over, the likelier first.
    pub messages: Vec<Vec<u8>>,
}

/// Reads a line; none when it is no event.
pub fn read(line: &[u8]) -> Option<Read> {
    let text = std::str::from_utf8(line).ok()?;
    let first = text.chars().find(|character| *character != ' ' && *character != '\t');
    if first == Some('{') { json(text) } else { cef(text) }
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
        let stamp = match before.rfind(' ') {
            Some(space) => &before[..space],
            None => before,
        };
        if !stamp.is_empty() {
            read.pairs.push(("event_ts".to_owned(), Some(stamp.to_owned())));
        }
    }
    for (name, piece) in names.iter().zip(&pieces) {
        read.pairs.push(((*name).to_owned(), Some(unescaped(piece, &[('|', '|'), ('\\', '\\')]))));
    }
    read.header = read.pairs.len();
    let mut end = text.len();
    if let Some(at) = text.rfind(" sig=").filter(|at| *at >= extension) {
        read.signature = Some(text[at + 5..].to_owned());
        read.messages.push(text.as_bytes()[..at].to_vec());
        end = at;
    }

    // Word by word: one that begins with `key=` begins a pair, the others go on with its value.
    let mut open: Option<(String, Vec<&str>)> = None;
    let mut close = |pair: Option<(String, Vec<&str>)>| {
        if let Some((key, words)) = pair {
            let escapes = [('=', '='), ('\\', '\\'), ('n', '\n'), ('r', '\r')];
            read.pairs.push((key, Some(unescaped(&words.join(" "), &escapes))));
        }
    };
    for word in text[extension..end].split(' ') {
        match (key_of(word), &mut open) {
            (Some((key, value)), _) => {
                close(open.take());
                open = Some((key.to_owned(), vec![value]));
            }
            (None, Some((_, words))) => words.push(word),
            (None, None) => {}
        }
    }
    close(open);
    Some(read)
}

fn is_at(text: &str, at: usize, part: &str) -> bool {
    text.as_bytes()[at..].starts_with(part.as_bytes())
}

/// A word's key and the rest of it.
fn key_of(word: &str) -> Option<(&str, &str)> {
    let (key, value) = word.split_once('=')?;
    let is_key = !key.is_empty() && key.chars().all(|it| it.is_ascii_alphanumeric() || "_.-[]".contains(it));
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
    /// Where the key's opening quote stands.
    key_at: usize,
    value_at: usize,
    value_end: usize,
}

fn json(text: &str) -> Option<Read> {
    let outer = object(text)?;
    let others: Vec<&Member> = outer.iter().filter(|member| member.key != "sig").collect();
    let inner = match others[..] {
        [member] if member.key == "event" && text[member.value_at..].starts_with('{') => {
            Some((member.value_at, &text[member.value_at..member.value_end]))
        }
        _ => None,
    };
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
                    if plain && text.get(start + inner.len()..) == Some("}") {
                        read.messages.push([&inner[..from], &inner[to..]].concat().into_bytes());
                    }
                }
                (_, None) => {}
            }
            (members, inner)
        }
    };
    if let Some((value, from, to)) = signed {
        read.signature = Some(value);
        read.messages.insert(0, [&text[..from], &text[to..]].concat().into_bytes());
    }
    read.pairs = fields.iter().map(|member| (member.key.clone(), scalar(member.value(of)))).collect();
    Some(read)
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

    /// Told of each member: where its key begins and ends, and its value.
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

/// How often each key occurs.
pub fn occurrences(pairs: &[(String, Option<String>)]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for (key, _) in pairs {
        *counts.entry(key.as_str()).or_insert(0) += 1;
    }
    counts
}
