// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.text

import kotlinx.serialization.json.Json
import kotlinx.serialization.json.JsonArray
import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonNull
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.booleanOrNull
import kotlinx.serialization.json.intOrNull
import turbopocket.core.Refused
import turbopocket.core.refuse
import java.io.File

/** A token that is looked for in the text before, or (`normalized`) after normalization. */
internal class AddedToken(val content: String, val id: Int, val normalized: Boolean)

/** What a CLIP `tokenizer.json` (format of the `tokenizers` library, 1.0) says, where such files differ. */
internal class Rules(
    val ids: Map<String, Int>,
    /** Rank by pair: lower merges first. */
    val ranks: Map<Pair<String, String>, Int>,
    val unknown: String,
    val wordEnd: String,
    val added: List<AddedToken>,
    val normalizers: List<Normalizer>,
    val start: Int,
    val end: Int,
    val padding: Int,
)

/** One step of normalization. */
internal enum class Normalizer { NFC, SPACES, LOWERCASE }

/** CLIP's words: the marks, English endings, runs of letters, single digits, runs of other signs. */
private const val CLIP_WORDS =
    """<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

/** The rules in [file]. Throws Refused for what is not JSON, and for a tokenizer that does otherwise than CLIP's. */
internal fun readRules(file: File): Rules {
    try {
        return rules(Json.parseToJsonElement(file.readText()).jsonAs<JsonObject>("the file"))
    } catch (error: Refused) {
        throw Refused("$file: ${error.message}", error)
    } catch (error: IllegalArgumentException) {
        throw Refused("$file is not JSON: ${error.message?.lineSequence()?.first()}", error)
    }
}

private fun rules(root: JsonObject): Rules {
    requireClipWords(root.obj("pre_tokenizer"))
    val model = root.obj("model")
    requireValue(model, "type", "BPE")
    for (key in listOf("dropout", "byte_fallback", "ignore_merges", "fuse_unk")) requireOff(model, key)
    if (!model.isAbsent("continuing_subword_prefix")) requireValue(model, "continuing_subword_prefix", "")
    val marks = root.obj("post_processor").also { requireValue(it, "type", "RobertaProcessing") }
    return Rules(
        ids = model.obj("vocab").mapValues { (token, id) -> id.int("the id of '$token'") },
        ranks = model.array("merges").withIndex().associate { (rank, pair) -> pair(pair) to rank },
        unknown = model.text("unk_token"),
        wordEnd = model.text("end_of_word_suffix"),
        added = root.array("added_tokens").map(::addedToken),
        normalizers = normalizers(root.obj("normalizer")).also {
            if (it.lastIndexOf(Normalizer.NFC) > 0) refuse("its NFC is not the first of its normalizers")
        },
        start = marks.array("cls").getOrNull(1).int("cls"),
        end = marks.array("sep").getOrNull(1).int("sep"),
        padding = (root["padding"] as? JsonObject ?: refuse("it does not say which id fills the end"))["pad_id"]
            .int("pad_id"),
    )
}

private fun pair(element: JsonElement): Pair<String, String> {
    val parts = (element as? JsonArray)?.map { it.jsonAs<JsonPrimitive>("a merge").content }
        ?: element.jsonAs<JsonPrimitive>("a merge").content.split(' ')
    if (parts.size != 2) refuse("merge $element is not of two")
    return parts[0] to parts[1]
}

private fun addedToken(element: JsonElement): AddedToken {
    val token = element.jsonAs<JsonObject>("an added token")
    for (key in listOf("single_word", "lstrip", "rstrip")) requireOff(token, key)
    val normalized = token["normalized"].jsonAs<JsonPrimitive>("normalized").booleanOrNull == true
    return AddedToken(token.text("content"), token["id"].int("id"), normalized)
}

private fun normalizers(element: JsonObject): List<Normalizer> = when (val type = element.text("type")) {
    "Sequence" -> element.array("normalizers").flatMap { normalizers(it.jsonAs("a normalizer")) }
    "NFC" -> listOf(Normalizer.NFC)
    "Lowercase" -> listOf(Normalizer.LOWERCASE)
    "Replace" -> {
        requireValue(element.obj("pattern"), "Regex", "\\s+")
        requireValue(element, "content", " ")
        listOf(Normalizer.SPACES)
    }
    else -> refuse("normalizer $type is not CLIP's")
}

private fun requireClipWords(sequence: JsonObject) {
    requireValue(sequence, "type", "Sequence")
    val steps = sequence.array("pretokenizers").map { it.jsonAs<JsonObject>("a pretokenizer") }
    if (steps.map { it.text("type") } != listOf("Split", "ByteLevel")) refuse("its pretokenizers are not CLIP's")
    requireValue(steps[0].obj("pattern"), "Regex", CLIP_WORDS)
    requireValue(steps[0], "behavior", "Removed")
    if (steps[0]["invert"] != JsonPrimitive(true)) refuse("it removes what CLIP keeps")
    requireOff(steps[1], "add_prefix_space")
    if (steps[1]["use_regex"] != JsonPrimitive(true)) refuse("its bytes are not CLIP's: use_regex is off")
}

private inline fun <reified T : JsonElement> JsonElement?.jsonAs(what: String): T =
    this as? T ?: refuse("$what is not as in a CLIP tokenizer")

private fun JsonElement?.int(what: String): Int =
    (this as? JsonPrimitive)?.takeUnless { it.isString }?.intOrNull ?: refuse("$what is no number")

private fun JsonObject.obj(key: String): JsonObject = this[key].jsonAs(key)

private fun JsonObject.array(key: String): JsonArray = this[key].jsonAs(key)

private fun JsonObject.text(key: String): String =
    (this[key] as? JsonPrimitive)?.takeIf { it.isString }?.content ?: refuse("$key is not as in a CLIP tokenizer")

private fun JsonObject.isAbsent(key: String) = this[key] == null || this[key] is JsonNull

private fun requireValue(where: JsonObject, key: String, allowed: String) {
    val found = where.text(key)
    if (found != allowed) refuse("$key is '$found', CLIP's is '$allowed'")
}

private fun requireOff(where: JsonObject, key: String) {
    if (!where.isAbsent(key) && where[key] != JsonPrimitive(false)) refuse("$key is ${where[key]}, CLIP has none")
}
