"""The structured report of a scored image: TID 1500, one measurement group for each finding, in the image's own study.

Each group has probability, threshold, and whether the probability reaches the threshold. It never states that a
finding is present. Must not import a model or the network.
"""

from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from dicom.dataset.facts import RESULT_DEVICE
from dicom.outgoing.codes import finding_code, own_code, schemes
from dicom.outgoing.results import NOTICE, SERIES_NUMBERS, SYNTAX, Score, Scored, finish, reference, result_uid

CHEST_IMAGE = Code("399208008", "SCT", "Plain chest X-ray")
AT_OR_ABOVE = own_code("above-threshold", "Probability is at or above the threshold")
DEVICE_OBSERVER = CodedConcept("121007", "DCM", "Device")


def report(image: Dataset, scored: Scored) -> Dataset:
    """Return a Comprehensive SR (PS3.3 A.35.3) for one image. Raises HeaderIncomplete if its header lacks a UID."""
    source = reference(image)
    observer = DeviceObserverIdentifyingAttributes(
        uid=result_uid("device", scored.device), name="cxrloop", manufacturer_name="cxrloop",
        model_name=RESULT_DEVICE, serial_number=scored.device[:16],
    )  # fmt: skip
    content = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                observer_type=DEVICE_OBSERVER, observer_identifying_attributes=observer
            )
        ),
        procedure_reported=CHEST_IMAGE,
        imaging_measurements=[_group(source, scored, score) for score in scored.scores],
    )
    content[0].ContentSequence.append(_comment(scored))
    result = ComprehensiveSR(
        evidence=[source],
        content=content[0],
        series_instance_uid=scored.uid("sr", "series"),
        series_number=SERIES_NUMBERS["sr"],
        sop_instance_uid=scored.uid("sr"),
        instance_number=1,
        manufacturer="cxrloop",
        is_complete=True,
        is_final=False,
        is_verified=False,
        transfer_syntax_uid=SYNTAX,
        series_description=f"cxrloop report: {NOTICE.lower()}",
        coding_schemes=schemes(),
    )
    return finish(result, image, scored)


def _group(source: Dataset, scored: Scored, score: Score) -> MeasurementsAndQualitativeEvaluations:
    side = "at or above" if score.above else "below"
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=scored.uid("sr", "finding", score.finding), identifier=f"{score.finding}: {side} threshold"
        ),
        finding_type=finding_code(score.finding),
        algorithm_id=AlgorithmIdentification(
            name="cxrloop", version=f"bundle {scored.bundle}", parameters=[f"threshold={score.threshold:.6g}", NOTICE]
        ),
        measurements=[
            Measurement(name=codes.DCM.Probability, value=_number(score.probability), unit=codes.UCUM.NoUnits),
            Measurement(name=codes.DCM.ThresholdValue, value=_number(score.threshold), unit=codes.UCUM.NoUnits),
        ],
        qualitative_evaluations=[
            QualitativeEvaluation(name=AT_OR_ABOVE, value=codes.SCT.Yes if score.above else codes.SCT.No)
        ],
        source_images=[SourceImageForMeasurementGroup(source.SOPClassUID, source.SOPInstanceUID)],
    )


def _number(value: float) -> float:
    """Return four significant digits: the model is not more precise, and DS has at most 16 characters."""
    return float(f"{value:.4g}")


def _comment(scored: Scored) -> TextContentItem:
    lines = "; ".join(f"{s.finding} {s.probability:.4f} (threshold {s.threshold:.4f})" for s in scored.scores)
    return TextContentItem(
        name=CodedConcept.from_code(codes.DCM.Comment),
        value=f"{NOTICE}. Probabilities by cxrloop {scored.version}, model bundle {scored.bundle}: {lines}. "
        "Not verified by a person. The threshold is the model's operating point, not a diagnosis.",
        relationship_type=RelationshipTypeValues.CONTAINS,
    )
